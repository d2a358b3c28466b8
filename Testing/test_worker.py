"""The worker and its client, in real processes: what comes back, what is kept, and everything that can go wrong."""

from __future__ import annotations

import getpass
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import MedXAILib as mx
from MedXAILib import protocol, resources, run, worker
from MedXAILib.client import Job, WorkerClient

ROOT = Path(__file__).resolve().parent.parent

# Far beyond what anything here takes, for machines that are busy with something else.
PATIENCE = 120.0

NETWORKS = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
from MedXAILib import Model

class Network(nn.Module):
    def __init__(self, doing=lambda x: None):
        super().__init__()
        self.features, self.head, self.doing = nn.Conv3d(1, 4, 3, padding=1), nn.Linear(4, 2), doing

    def forward(self, x):
        self.doing(x)
        return self.head(self.features(x).relu().mean((2, 3, 4)))

def quick(doing=lambda x: None):
    torch.manual_seed(0)
    return Model(Network(doing), class_names=("benign", "malignant"))

def counted():
    with Path(__file__).with_name("loads").open("a") as file:
        file.write("x")
    return quick()

def slow():
    return quick(lambda x: time.sleep(0.05))

def stuck():
    return quick(lambda x: time.sleep(600))

def talking():
    def talk(x):
        print("Hello from Python")
        os.write(1, b"Hello from C\\xff")
        os.system("echo Hello from a program")
        print({"id": 1, "type": "result"}, file=sys.__stdout__)
    return quick(talk)

def hungry():
    def starve(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return quick(starve)

def greedy():
    return quick(lambda x: x.is_cuda and torch.empty(1 << 45, device=x.device))

def broken():
    return quick(lambda x: 1 / 0)

PREPARED = []

def prepared():
    model = quick()
    model.preprocessing = lambda image: PREPARED.append(1) or image * 2
    return model

def greedy_for_much():
    def starve(x):
        if x.requires_grad and x[0].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return quick(starve)
"""

VOXELS = np.random.default_rng(0).normal(size=(1, 10, 9, 8)).astype(np.float32)
AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])
SCAN = {"data": VOXELS, "affine": AFFINE, "source": "a scan"}

# Takes 25 s when nobody stops it: one noisy copy after the other.
LONG = {
    "op": "explain",
    "model": "networks_of_the_test:slow",
    "volume": SCAN,
    "method": "gradient",
    "parameters": {"samples": 500},
    "memory_budget": 1,
}


def ask(name: str, op: str = "explain", **fields: Any) -> dict[str, Any]:
    method = {"method": "gradcam"} if op == "explain" else {}
    volume = {} if op == "load" else {"volume": SCAN}
    return {"op": op, "model": f"networks_of_the_test:{name}", **volume, **method, **fields}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a place") / "Bildgebung für 脳"
    folder.mkdir()
    (folder / "networks_of_the_test.py").write_text(NETWORKS, encoding="utf-8")
    return folder


def make_client(place: Path, **options: Any) -> WorkerClient:
    folders = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    return WorkerClient(folder=place, environment=environment, **options)


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[WorkerClient]:
    with make_client(place) as client:
        yield client
    assert not client.folder.exists()


@pytest.fixture(scope="module")
def in_process(place: Path) -> Iterator[Callable[..., mx.SaliencyMap]]:
    sys.path.append(str(place))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, method="gradcam", **fields: mx.explain(
        mx.load_model(f"networks_of_the_test:{name}"),
        mx.Volume(torch.from_numpy(VOXELS), AFFINE, "a scan"),
        method,
        **fields,
    )
    torch.set_num_threads(threads)
    sys.path.remove(str(place))


def reached(condition: Callable[[], Any], client: WorkerClient | None = None) -> bool:
    """Whether `condition` comes true while somebody looks after `client`."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if client is not None:
            client.poll(0.02)
        if condition():
            return True
        time.sleep(0.01)
    return False


def running(client: WorkerClient) -> Job:
    """A long job that has begun to compute."""
    job = client.submit(LONG)
    assert reached(lambda: job.progress is not None and job.progress.done > 0, client)
    return job


def process_of(client: WorkerClient) -> psutil.Process:
    assert client._link is not None
    return psutil.Process(client._link.process.pid)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"worker.log"}


def same(one: mx.SaliencyMap, other: mx.SaliencyMap) -> bool:
    changing = {"created", "seconds", "peak_memory"}
    made = [{k: v for k, v in e.provenance.model_dump().items() if k not in changing} for e in (one, other)]
    return bool(
        made[0] == made[1]
        and torch.equal(one.data, other.data)
        and np.array_equal(one.affine, other.affine)
        and one.residual == other.residual
    )


def test_maps_equal_those_of_the_library_in_files_and_in_the_stream(client, place, in_process):
    request = ask("quick", target=["malignant", "benign"], method="integrated_gradients", seed=7)
    expected = in_process("quick", "integrated_gradients", target=["malignant", "benign"], run=mx.Run(seed=7))
    with make_client(place, stream=True) as streamed:
        for asked in (client, streamed):
            before = files(asked.folder)
            job = asked.submit(request)
            maps = [mx.load_explanation(folder) for folder in job.wait(PATIENCE)["folders"]]
            assert len(maps) == 2
            assert all(same(one, other) for one, other in zip(maps, expected, strict=True))
            # Only the result is left on the disk, and not even that after it was discarded.
            assert len(files(asked.folder) - before) == 4
            job.discard()
            assert files(asked.folder) == before
        # Two scans, then one of a known key, larger than what travels at once.
        large = np.random.default_rng(1).normal(size=(1, 80, 70, 60)).astype(np.float32)
        results = []
        for scan in ({**SCAN, "data": large}, SCAN, {**SCAN, "data": large, "key": "b"}, {"key": "b"}):
            results += [c.submit(ask("quick", "predict", volume=scan)).wait(PATIENCE) for c in (client, streamed)]
        assert results[0] == results[1] == results[4] == results[5] == results[6] == results[7] != results[2]
        assert results[2] == results[3]
    assert not streamed.folder.exists()


def test_the_shipped_network_segments_and_explains(client, place):
    bundle = shutil.copytree(resources.path("Models/lung_nodule_segmentation"), place / "Modèle α")
    patch = mx.load_volume(resources.path("SampleData/chest_ct_nodule.nrrd"))
    region = mx.load_volume(resources.path("SampleData/chest_ct_nodule_mask.nrrd"))
    centre = region.to_point(np.argwhere(region.data[0].numpy() > 0).mean(0)).tolist()
    about = client.submit({"op": "load", "model": bundle}).wait(PATIENCE)
    assert (about["task"], about["source"]) == ("segmentation", str(bundle))
    assert about["layers"] and about["class_names"]
    assert about["patch_size"] == about["window"] == [40, 40, 40]
    assert about["fingerprint"] == mx.load_model(bundle).fingerprint
    scan = {"data": patch.data.numpy().astype(np.int16), "affine": patch.affine, "key": "chest"}
    found = client.submit({"op": "predict", "model": bundle, "volume": scan, "region": centre}).wait(PATIENCE)
    expected = mx.load_model(bundle).predict(patch, centre).labels
    assert expected is not None and np.array_equal(found["labels"], expected.data.numpy())
    within = {"data": region.data.numpy(), "affine": region.affine}
    target = {"kind": "SegmentationTarget", "which": 1, "within": within}
    request = {
        "op": "explain",
        "model": bundle,
        "volume": scan,
        "region": centre,
        "target": target,
        "method": "gradcam",
    }
    result = mx.load_explanation(client.submit(request).wait(PATIENCE)["folders"][0])
    assert result.data.shape == patch.data.shape and result.data.any()


def test_a_volume_among_the_parameters_arrives(client, in_process):
    other = {"data": VOXELS[..., :5] / 2, "affine": AFFINE}
    request = ask("quick", method="occlusion", target=1, parameters={"infill": other, "window": [4]})
    found = mx.load_explanation(client.submit(request).wait(PATIENCE)["folders"][0])
    infill = mx.Volume(torch.from_numpy(VOXELS[..., :5] / 2), AFFINE)
    expected = in_process("quick", "occlusion", target=1, infill=infill, window=(4,))
    assert same(found, expected) and found.data.any()
    assert not torch.equal(found.data, in_process("quick", "occlusion", target=1, window=(4,)).data)


def test_the_network_is_loaded_once(client, place):
    first = client.submit(ask("counted", "load")).wait(PATIENCE)
    for _ in range(3):
        client.submit(ask("counted")).wait(PATIENCE)
    assert first["class_names"] == ["benign", "malignant"] and first["layers"] == ["features", "head"]
    assert first["window"] is None
    assert (place / "loads").read_text() == "x"


def test_a_changed_bundle_is_loaded_again(tmp_path):
    bundle = shutil.copytree(resources.path("Models/lung_nodule"), tmp_path / "bundle")
    first = worker._model(str(bundle), False, None)
    assert worker._model(str(bundle), False, None) is first
    os.utime(next((bundle / "models").iterdir()), ns=(1, 1))
    assert worker._model(str(bundle), False, None) is not first


def test_progress_arrives_with_the_time_left(client):
    seen, done = [], []
    request = {**LONG, "parameters": {"samples": 8}}
    job = client.submit(request, lambda job: seen.append(job.progress), done.append)
    job.wait(PATIENCE)
    assert done == [job] and job.state == "done"
    assert [p.done for p in seen if "noisy" in p.message] == sorted(p.done for p in seen if "noisy" in p.message)
    assert {"Reading the network", "Reading the scan", "Writing"} <= {p.message for p in seen}
    assert any(p.seconds_left for p in seen)


def test_cancel_leaves_the_worker_as_it_was(client):
    client.grace = PATIENCE
    job, before = running(client), process_of(client)
    waiting = client.submit(LONG)
    waiting.cancel()
    assert waiting.state == "cancelled"
    started = time.monotonic()
    job.cancel()
    with pytest.raises(mx.Cancelled):
        job.wait(PATIENCE)
    # A step takes 0.05 s.
    assert time.monotonic() - started < 5
    assert (job.state, job.result) == ("cancelled", None)
    job.cancel()
    client.submit(ask("quick")).wait(PATIENCE)
    assert process_of(client) == before
    client.grace = 0.8


# A window in each of 720 places: 36 s.
OCCLUDED = {**LONG, "method": "occlusion", "target": 1, "parameters": {"window": [2, 1, 1]}}


def test_a_method_that_can_end_early_gives_what_it_has(client):
    shown, started = [], time.monotonic()
    job = client.submit(OCCLUDED, on_partial=lambda job, so_far: shown.append(np.count_nonzero(so_far)))
    assert reached(lambda: len(shown) > 1, client)
    asked, before = time.monotonic(), process_of(client)
    job.finish()
    found = mx.load_explanation(job.wait(PATIENCE)["folders"][0])
    # A step takes 0.05 s.
    assert time.monotonic() - asked < 5 and time.monotonic() - started < 30
    assert found.provenance.partial and any(n.startswith("Stopped early, at") for n in found.provenance.notes)
    assert 0 < shown[0] < shown[1] <= int(found.data.count_nonzero()) < found.data.numel()
    job.finish()
    assert job.state == "done" and process_of(client) == before
    job.discard()


def test_what_cannot_end_early_is_cancelled(client):
    kept, job = files(client.folder), running(client)
    waiting = client.submit(OCCLUDED)
    waiting.finish()
    job.finish()
    with pytest.raises(mx.Cancelled):
        job.wait(PATIENCE)
    assert waiting.state == "cancelled"
    assert not files(client.folder) - kept


def test_what_is_about_to_end_early_can_still_be_cancelled(client):
    kept, job = files(client.folder), client.submit(ask("stuck", method="occlusion"))
    assert reached(lambda: job.progress is not None and job.progress.message.startswith("Occlusion"), client)
    job.finish()
    job.cancel()
    with pytest.raises(mx.Cancelled):
        job.wait(PATIENCE)
    assert not files(client.folder) - kept


def test_a_worker_that_cannot_end_early_is_cancelled(tmp_path):
    with WorkerClient([sys.executable, "-c", IMPOSTOR + "greet(); time.sleep(600)"], tmp_path) as client:
        job = client.submit(OCCLUDED)
        assert reached(lambda: job.state == "running", client)
        job.finish()
        with pytest.raises(mx.Cancelled):
            job.wait(PATIENCE)


def test_a_stuck_worker_is_killed_and_replaced(client):
    job, before = client.submit(ask("stuck")), process_of(client)
    assert reached(lambda: job.progress is not None and job.progress.message == "Grad-CAM", client)
    kept = files(client.folder)
    job.cancel()
    with pytest.raises(mx.Cancelled):
        job.wait(PATIENCE)
    assert not before.is_running()
    assert not files(client.folder) - kept
    client.submit(ask("quick")).wait(PATIENCE)


def test_a_killed_worker_costs_one_job_and_leaves_nothing_behind(client):
    kept = files(client.folder)
    for _ in range(3):
        job, next_job = running(client), client.submit(ask("quick"))
        process_of(client).kill()
        with pytest.raises(mx.MedXAIError, match=r"^The worker stopped in the middle of this .*: try again.*\.$"):
            job.wait(PATIENCE)
        assert job.state == "failed"
        next_job.wait(PATIENCE)
        next_job.discard()
    assert not files(client.folder) - kept


REFUSED = {
    "no such network": (ask("quik"), mx.MedXAIError, "There is no function .* did you mean quick"),
    "no such file": ({**ask(""), "model": "nowhere"}, mx.MedXAIError, "There is no model 'nowhere'"),
    "no such operation": (ask("quick", "explane"), mx.MedXAIError, "no request 'explane': did you mean explain"),
    "no such field": (ask("quick", colour=1), mx.MedXAIError, "not how to ask to explain .*colour"),
    "no such parameter": (ask("quick", parameters={"layer": 1}), mx.MedXAIError, "no parameter of gradcam 'layer'"),
    "no such target": (ask("quick", target={"kind": "x"}), mx.MedXAIError, "is no target"),
    "no such scan": (ask("quick", volume={"key": "gone"}), mx.MedXAIError, "send it again"),
    "nothing to see": (ask("quick", volume={**SCAN, "data": 0 * VOXELS}), mx.MedXAIError, "is constant"),
    "out of memory": (ask("hungry"), mx.OutOfMemory, "computer has .*: allow a smaller region, use a"),
    "a defect": (ask("broken"), mx.MedXAIError, r"^ZeroDivisionError: .* \(unexpected: the worker's log says where\)$"),
    "no message": (ask("quick", target={1, 2}), mx.MedXAIError, "cannot hold set"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_said_in_a_sentence(client, what):
    request, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message) as caught:
        client.submit(request).wait(PATIENCE)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    client.submit(ask("quick")).wait(PATIENCE)


def test_where_a_defect_is_stands_in_the_log(client):
    with pytest.raises(mx.MedXAIError):
        client.submit(ask("broken")).wait(PATIENCE)
    assert reached(lambda: "1 / 0" in client.log.read_text(encoding="utf-8"))


def test_a_bundle_with_code_needs_trust(client, tmp_path):
    bundle = shutil.copytree(resources.path("Models/lung_nodule"), tmp_path / "bundle")
    config = bundle / "configs" / "inference.json"
    bundled = json.loads(config.read_text(encoding="utf-8"))
    bundled["network_def"]["note"] = "$print('ran')"
    config.write_text(json.dumps(bundled), encoding="utf-8")
    with pytest.raises(mx.Untrusted) as caught:
        client.submit({"op": "load", "model": bundle}).wait(PATIENCE)
    assert "$print('ran')" in caught.value.code


def test_what_a_network_prints_goes_to_the_log(client, in_process):
    result = client.submit(ask("talking")).wait(PATIENCE)
    assert torch.equal(mx.load_explanation(result["folders"][0]).data, in_process("quick").data)
    said = ("Hello from Python", "Hello from C", "Hello from a program")
    assert reached(lambda: all(s in client.log.read_text(encoding="utf-8") for s in said))


def test_the_log_stays_small(client):
    for _ in range(30):
        client._log("x" * 50_000)
    assert client.log.stat().st_size < 1_100_000


def test_nobody_waits_for_the_worker(client):
    # Sixteen times what a pipe holds, to a worker that is busy.
    job, longest = running(client), 0.0
    large = client.submit(ask("quick", volume={**SCAN, "data": np.ones((1, 64, 64, 64), np.float32)}))
    for _ in range(50):
        started = time.perf_counter()
        client.poll()
        longest = max(longest, time.perf_counter() - started)
        time.sleep(0.01)
    assert longest < 1
    large.cancel()
    job.cancel()
    with pytest.raises(mx.Cancelled):
        job.wait(PATIENCE)


# What every worker that is not ours begins with.
IMPOSTOR = """
import json, os, sys, time
def hear():
    return json.loads(next(line for line in sys.stdin if line.strip()))
def say(id, type, **fields):
    print(json.dumps({"id": id, "type": type, **fields}), flush=True)
def greet(**fields):
    hello = hear()
    say(0, "result", value={"protocol": hello["protocol"], "version": hello["version"], **fields})
"""

IMPOSTORS = {
    "says nothing": ("time.sleep(600)", "did not start .no answer within 1.5 s.: check the command"),
    "ends at once": (
        "print('No module', file=sys.stderr); sys.exit(3)",
        r"not start \(exit code 3, No module\): check",
    ),
    "another protocol": ("greet(protocol=99)", r"\(protocol 99\) and MedXAI .* cannot work together: install the same"),
    "another version": ("greet(version='0.0.1')", "MedXAI 0.0.1 .* cannot work together: install the same version"),
    "refuses": ("hear(); say(0, 'error', kind='refused', message='Go away.', code='')", "^Go away.$"),
    "crashes": ("greet(); hear(); import ctypes; ctypes.string_at(0)", "stopped in the middle of this"),
    "half a result": ("greet(); say(hear()['id'], 'result', value={'folders': [{}]}); hear()", "did not arrive whole"),
    "half an array": (
        'greet(); i = hear()[\'id\']; print(\'{"blob": "a", "part": "aGk="}\'); '
        "say(i, 'result', value={'scores': {'npy': {'blob': 'a', 'size': 9}}}); hear()",
        "arrived damaged: 2 of 9 bytes",
    ),
    "no such array": (
        "greet(); say(hear()['id'], 'result', value={'npy': '/nowhere.npy'}); hear()",
        "arrived damaged: .*nowhere.npy",
    ),
}


@pytest.mark.parametrize("how", IMPOSTORS)
def test_a_worker_that_misbehaves_fails_the_job_with_a_sentence(tmp_path, how):
    body, message = IMPOSTORS[how]
    command = [sys.executable, "-c", IMPOSTOR + body]
    with WorkerClient(command, tmp_path, patience=1.5 if how == "says nothing" else PATIENCE) as client:
        with pytest.raises(mx.MedXAIError, match=message) as caught:
            client.submit(ask("quick")).wait(PATIENCE)
        assert "\n" not in str(caught.value)
        assert not files(client.folder)
    assert not list(tmp_path.iterdir())


def test_a_command_that_does_not_exist(tmp_path):
    with WorkerClient([str(tmp_path / "no python")], tmp_path) as client, pytest.raises(mx.MedXAIError) as caught:
        client.submit(ask("quick")).wait(PATIENCE)
    assert str(caught.value).startswith("The worker cannot be started") and "no python" in str(caught.value)


def test_garbage_between_the_messages_is_passed_over(tmp_path):
    garbage = r"b'Welcome!\r\n\xff\xfe' + os.urandom(5000) + b'\n[1, 2]\n{\"id\": 7}\n{\"id\": 0, \"type\"'"
    body = f"""
def garbage():
    sys.stdout.buffer.write({garbage}); sys.stdout.buffer.write(b'\\n'); sys.stdout.flush()
garbage(); greet(); garbage(); id = hear()['id']; garbage(); say(id, 'result', value={{"scores": {{}}}}); hear()
"""
    with WorkerClient([sys.executable, "-c", IMPOSTOR + body], tmp_path) as client:
        assert client.submit(ask("quick", "predict")).wait(PATIENCE) == {"scores": {}}
        assert "Welcome!" in client.log.read_text(encoding="utf-8")


def test_a_disk_without_room_fails_the_job_and_nothing_else(tmp_path):
    body = "greet()\nwhile True: say(hear()['id'], 'result', value={})"
    with WorkerClient([sys.executable, "-c", IMPOSTOR + body], tmp_path) as client:
        (client.folder / "1").write_text("in the way")
        with pytest.raises(mx.MedXAIError, match=r"cannot be handed to the worker .*: make room in"):
            client.submit(ask("quick")).wait(PATIENCE)
        client.submit(ask("quick")).wait(PATIENCE)


def test_a_worker_that_died_idle_costs_no_job(tmp_path):
    been = f"os.path.exists({str(tmp_path / 'been')!r})"
    body = f"greet()\nif not {been}: open({str(tmp_path / 'been')!r}, 'w').close(); sys.exit(1)\n"
    with WorkerClient([sys.executable, "-c", IMPOSTOR + body + "say(hear()['id'], 'result', value={})"]) as client:
        client.start()
        link = client._link
        assert link is not None and reached(lambda: client.worker, client)
        assert reached(lambda: link.process.poll() is not None)
        assert client.submit(ask("quick")).wait(PATIENCE) == {}


def test_a_worker_that_does_not_listen_is_killed(tmp_path):
    with WorkerClient([sys.executable, "-c", IMPOSTOR + "greet(); time.sleep(600)"], tmp_path, stream=True) as client:
        job = client.submit(ask("quick", volume={**SCAN, "data": np.zeros((1, 128, 128, 128), np.float32)}))
        assert reached(lambda: job.state == "running", client)
        job.cancel()
        with pytest.raises(mx.Cancelled):
            job.wait(PATIENCE)
        job, waiting = client.submit(ask("quick")), client.submit(ask("quick"))
        assert reached(lambda: job.state == "running", client)
    assert (job.state, waiting.state) == ("cancelled", "cancelled")


def test_the_client_needs_no_pytorch():
    code = "import sys, MedXAILib.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def conversation(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What a worker in this process answers."""
    heard, said = io.BytesIO(), io.BytesIO()
    to_worker = protocol.Channel(io.BytesIO(), heard, print)
    for message in (*messages, {"id": 0, "op": "shutdown"}):
        to_worker.send(message)
    heard.seek(0)
    worker.Worker(protocol.Channel(heard, said, print)).serve()
    said.seek(0)
    return list(protocol.Channel(said, io.BytesIO(), print))


def test_the_worker_refuses_a_client_of_another_protocol():
    (answer,) = conversation({"id": 0, "op": "hello", "protocol": 0, "version": "0.0.1", "scratch": None})
    assert answer["type"] == "error" and "cannot work together: install the same version" in answer["message"]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_gpu_too_small_is_left_for_the_cpu_only_with_consent(monkeypatch, in_process, allowed):
    tried = []

    def explain(model, *args, run, **fields):
        tried.append((run.device, run.precision))
        if run.device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return mx.explain(model, *args, run=run, **fields)

    monkeypatch.setattr(worker, "_place", lambda model, device: None)
    monkeypatch.setattr(worker, "explain", explain)
    answer = conversation({"id": 1, **ask("quick", device="cuda", allow_cpu=allowed)})[-1]
    assert tried == [("cuda", None), ("cuda", "float16"), ("cpu", None)][: 2 + allowed]
    if allowed:
        notes = json.loads(answer["value"]["folders"][0]["explanation.json"])["provenance"]["notes"]
        assert notes == ["Out of memory on cuda.", "Out of memory in float16.", "Computed on the CPU."]
    else:
        assert answer["kind"] == "out_of_memory"
        assert "The GPU has" in answer["message"] and "allow a smaller region, allow the CPU" in answer["message"]


def test_a_smaller_region_only_with_consent(in_process):
    request = {"id": 1, **ask("greedy_for_much", method="gradient", target=0)}
    refused, found = (conversation({**request, "allow_smaller_region": allowed}) for allowed in (False, True))
    assert refused[-1]["kind"] == "out_of_memory" and "allow a smaller region" in refused[-1]["message"]
    made = json.loads(found[-1]["value"]["folders"][0]["explanation.json"])["provenance"]
    assert np.ptp(made["region"], axis=0).tolist() == [10.0, 4.5, 4.0]
    assert made["notes"][-1].startswith("Only (") and made["notes"][-1].endswith("the rest was not looked at.")
    assert "Out of memory; going on with a smaller region" in [m.get("message") for m in found]


def test_a_scan_is_preprocessed_once_for_many_questions(in_process):
    import networks_of_the_test as networks

    def asked(*requests):
        networks.PREPARED.clear()
        answers = conversation(*({"id": i, **r} for i, r in enumerate(requests, 1)))
        assert not [a for a in answers if a["type"] == "error"]
        values = [a["value"] for a in answers if a["type"] == "result"]
        return values, len(networks.PREPARED)

    part = [[0, 0, 0], [12, 8, 7]]
    known = {"key": "a"}
    values, count = asked(
        ask("prepared", "predict", volume={**SCAN, **known}),
        ask("prepared", volume=known),
        ask("prepared", volume=known, method="gradient", target=1),
        ask("prepared", volume=known, region=part),
        # The same voxels, sent again.
        ask("prepared", method="gradient", target=1),
    )
    assert count == 1
    assert len({v["folders"][0]["map.nrrd"] for v in values[1:]}) == 3
    # Other voxels, or the same ones elsewhere, are another scan.
    elsewhere = {**SCAN, "affine": np.diag([2.0, 1.0, 1.0, 1.0]) + np.eye(4, k=3)}
    assert asked(ask("prepared"), ask("prepared", volume={**SCAN, "data": VOXELS + 1}))[1] == 1
    assert asked(ask("prepared", volume=elsewhere), ask("prepared"))[1] == 2
    # The library keeps nothing.
    model, volume = (
        mx.load_model("networks_of_the_test:prepared"),
        mx.Volume(torch.from_numpy(VOXELS), AFFINE, "a scan"),
    )
    networks.PREPARED.clear()
    first, again = (mx.explain(model, volume, "gradient", target=1) for _ in range(2))
    assert len(networks.PREPARED) == 2 and same(first, again)
    model.keeps_last = True
    assert all(same(mx.explain(model, volume, "gradient", target=1), first) for _ in range(2))
    assert len(networks.PREPARED) == 3


def test_it_says_what_methods_there_are():
    (answer,) = conversation({"id": 1, "op": "methods"})
    said = {method["id"]: method for method in answer["value"]["methods"]}
    assert list(said) == list(mx.methods())
    assert said["occlusion"]["anytime"] and not said["gradcam"]["anytime"]
    samples = next(p for p in said["smoothgrad"]["parameters"] if p["name"] == "samples")
    assert (samples["type"], samples["default"], samples["minimum"], samples["maximum"]) == ("int", 16, 1, 1000)


@pytest.mark.parametrize("listening", [True, False])
def test_unfinished_maps_are_sent_only_to_who_listens(monkeypatch, in_process, listening):
    monkeypatch.setattr(run, "_GLIMPSE_SECONDS", 0.0)
    monkeypatch.setattr(run, "_GLIMPSE_SHARE", float("inf"))
    fields = {"method": "smoothgrad", "target": 1, "parameters": {"samples": 3}, "memory_budget": 1}
    answers = conversation({"id": 1, **ask("quick", **fields, **({"partial": True} if listening else {}))})
    maps = [a["map"] for a in answers if a["type"] == "partial"]
    assert len(maps) == (3 if listening else 0)
    for samples in (2, 3)[: len(maps)]:
        expected = in_process("quick", "smoothgrad", target=1, samples=samples, run=mx.Run(memory_budget=1))
        assert np.array_equal(maps[samples - 1], expected.data[0].numpy())


def test_unfinished_maps_come_while_it_computes(client, place, in_process):
    request = {**LONG, "parameters": {"samples": 60}, "target": 1}
    counts, budget = range(2, 61), mx.Run(memory_budget=1)
    expected = [in_process("quick", "gradient", target=1, samples=n, run=budget).data[0].numpy() for n in counts]

    def check(asked: WorkerClient) -> None:
        before, shown, left = files(asked.folder), [], []

        def show(job: Job, so_far: np.ndarray) -> None:
            shown.append((job, so_far))
            left.append([name for name in files(asked.folder) - before if "partial" in name])

        job = asked.submit(request, on_partial=show)
        assert reached(lambda: job.progress is not None and job.progress.done > 0, asked)
        # Nobody looks for a while, which must not fill the disk.
        time.sleep(2.5)
        result = job.wait(PATIENCE)
        assert shown and all(j is job and a.shape == (10, 9, 8) and a.dtype == np.float32 for j, a in shown)
        assert max(map(len, left)) <= 1 and len(files(asked.folder) - before) == 2
        seen = [next(n for n, e in zip(counts, expected, strict=True) if np.array_equal(a, e)) for _, a in shown]
        assert seen == sorted(set(seen))
        assert np.array_equal(mx.load_explanation(result["folders"][0]).data[0].numpy(), expected[-1])
        job.discard()
        assert files(asked.folder) == before

    check(client)
    with make_client(place, stream=True) as streamed:
        check(streamed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_too_small(client):
    first = client.submit(ask("quick", device="cuda")).wait(PATIENCE)
    assert mx.load_explanation(first["folders"][0]).provenance.device.startswith("cuda")
    with pytest.raises(mx.OutOfMemory, match="allow the CPU"):
        client.submit(ask("greedy", device="cuda")).wait(PATIENCE)
    result = client.submit(ask("greedy", device="cuda", allow_cpu=True)).wait(PATIENCE)
    made = mx.load_explanation(result["folders"][0]).provenance
    assert made.device == "cpu" and made.notes[-1] == "Computed on the CPU."


ORPHAN = """
import os, sys
from test_worker import LONG, make_client, process_of, running
from pathlib import Path
client = make_client(Path(sys.argv[1]))
running(client)
print(process_of(client).pid, client.folder, sep="\\n", flush=True)
os._exit(1)
"""


def test_the_worker_ends_with_its_client(place):
    paths = os.pathsep.join([str(ROOT / "Testing"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1"}
    said = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(place)], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    pid, folder = said.stdout.splitlines()
    assert reached(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie")
    assert reached(lambda: not Path(folder).exists())


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """An ssh server of our own on the loopback, and the command that starts a worker through it."""
    server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if server is None or not shutil.which("ssh") or os.name == "nt":
        pytest.skip("needs sshd and ssh")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    (tmp_path / "authorized").write_bytes((tmp_path / "user.pub").read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "no",
    }
    (tmp_path / "config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    if os.geteuid() == 0:
        # Where a server that was never started as a service wants to be able to look.
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([server, "-D", "-f", tmp_path / "config"])

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    assert reached(listening)
    (tmp_path / "there").mkdir()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    there = {"PYTHONPATH": paths, "TMPDIR": tmp_path / "there", "OMP_NUM_THREADS": 1}
    remote = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in there.items())
    ssh = ["ssh", "-F", "none", "-p", str(port), "-i", str(tmp_path / "user"), "-o", "BatchMode=yes"]
    ssh += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path / 'hosts'}", "-o", "LogLevel=ERROR"]
    command = [*ssh, f"{getpass.getuser()}@127.0.0.1", f"{remote} {shlex.quote(sys.executable)} -m MedXAILib.worker"]
    yield SimpleNamespace(process=psutil.Process(process.pid), command=command, there=tmp_path / "there")
    process.kill()
    process.wait()


def test_over_ssh_until_the_link_is_cut(sshd, place, tmp_path):
    bundle = str(resources.path("Models/lung_nodule"))
    patch = np.random.default_rng(0).normal(-500, 300, size=(1, 40, 40, 40)).astype(np.float32)
    scan = {"data": patch, "affine": np.diag([1.25, 1.25, 1.25, 1.0])}
    volume = mx.Volume(torch.from_numpy(patch), scan["affine"])
    request = {"op": "explain", "model": bundle, "volume": scan, "method": "gradcam", "target": "malignant"}
    with WorkerClient(sshd.command, tmp_path, stream=True) as client:
        result = client.submit(request).wait(PATIENCE)
        expected = mx.explain(mx.load_model(bundle), volume, "gradcam", "malignant")
        assert torch.allclose(mx.load_explanation(result["folders"][0]).data, expected.data, atol=1e-6)
        job = client.submit({**request, "method": "gradient", "parameters": {"samples": 1000}, "memory_budget": 1})
        assert reached(lambda: job.progress is not None and job.progress.done > 0, client)
        children = sshd.process.children(recursive=True)
        workers = [p for p in children if "MedXAILib.worker" in p.cmdline() and "sshd" not in p.name()]
        for session in (p for p in children if p.name().startswith("sshd")):
            session.kill()
        with pytest.raises(mx.MedXAIError, match="stopped in the middle of this"):
            job.wait(PATIENCE)
        assert workers
        assert reached(lambda: not any(p.is_running() for p in workers))
        client.submit({"op": "load", "model": bundle}).wait(PATIENCE)
    # PyTorch has a folder of its own there, for what it may compile.
    assert reached(lambda: not [p for p in sshd.there.iterdir() if not p.name.startswith("torchinductor")])

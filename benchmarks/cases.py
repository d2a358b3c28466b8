"""What is compared: methods, networks, sizes, how each package is called, and what MedXAI promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any, Literal

import torch
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.supervoxels import grid

CLASSES = 10
Rows = Mapping[str, Mapping[str, Any]]
"""What was measured, by row name."""


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with the same random weights each time."""
    torch.manual_seed(0)
    made = build()
    for module in made.modules():
        # Normalisation with the statistics of a fresh network is the identity: give it something to do.
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        # With as many weights for as against a class, the map of every other class would be empty after its ReLU.
        if isinstance(module, nn.Linear):
            module.weight.data += module.weight.std()
    return made


def _noise(size: int) -> Tensor:
    return torch.randn(1, 1, size, size, size, generator=torch.Generator().manual_seed(1))


def _nodule(size: int) -> Tensor:
    """The patch of the sample chest CT around its nodule, as the shipped network sees it."""
    volume = mx.load_volume(resources.path("SampleData/chest_ct_nodule.nrrd"))
    x = _trained().prepare(volume, (21.9, 120.5, -611.5)).x[None]
    if x.shape[-1] != size:
        raise ValueError(f"the shipped network looks at {x.shape[-1]} voxels, not {size}")
    return x


def _trained() -> mx.Model:
    return mx.load_model(resources.path("Models/lung_nodule"))


def background(x: Tensor, count: int) -> Tensor:
    """`count` scans like `x` (1, 1, D, H, W) to compare it with, (count, 1, D, H, W): itself, shifted."""
    return torch.cat([x.roll(x.shape[2] * k // (count + 1), 2) for k in range(1, count + 1)])


def windows(x: Tensor, window: int, stride: int, count: int | None = None) -> list[tuple[int, ...]]:
    """Where the windows of a scan (1, 1, D, H, W) begin, the last at its end; or `count` of them, at random."""
    axes = [[*range(0, n - window, stride), n - window] for n in x.shape[2:]]
    found = list(product(*axes))
    return found if count is None else random.Random(0).sample(found, count)


def cubes(x: Tensor, size: int) -> Tensor:
    """The number of the cube of `size` voxels that each voxel is in, as `x` (1, 1, D, H, W)."""
    return torch.from_numpy(grid(x.shape[2:], (1.0, 1.0, 1.0), size))[None, None]


class _Middle(nn.Module):
    """The means of maps (N, C, D, H, W) over their middle, as scores. The mean over all of a map hardly depends on the
    scan: norms have taken it out."""

    def forward(self, maps: Tensor) -> Tensor:
        d, h, w = maps.shape[2:]
        return maps[:, :, d // 4 : -d // 4, h // 4 : -h // 4, w // 4 : -w // 4].mean((2, 3, 4))


def _unet() -> nn.Module:
    """MONAI's UNet as it comes: instance norms, PReLU."""
    unet = nets.UNet(3, 1, CLASSES, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2))
    return nn.Sequential(unet, _Middle())


def _sequential() -> nn.Module:
    """Layers in a row, each of its own: what all packages were made for."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise((1, 16, 32, 64, 128)):
        parts += [nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, CLASSES))


class _Transformer(nn.Module):
    """A vision transformer for volumes of 96 voxels a side, without the activation that MONAI puts after its scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = nets.ViT(1, 96, 16, 384, 1536, 12, 6, classification=True, num_classes=CLASSES, post_activation="")

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)[0]


@dataclass(frozen=True)
class Network:
    """A network from (N, 1, D, H, W) to class scores, the layer that class activation maps are of, and what it sees."""

    build: Callable[[], nn.Module]
    layer: str
    scan: Callable[[int], Tensor] = _noise
    """From a size to a volume (1, 1, size, size, size)."""


NETWORKS = {
    "resnet18": Network(
        lambda: _random(lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=CLASSES)), "layer4"
    ),
    # The stem of MedicalNet's weights, which is what most people use.
    "resnet18-medicalnet": Network(
        lambda: _random(
            lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=CLASSES, conv1_t_stride=2)
        ),
        "layer4",
    ),
    "densenet121": Network(
        lambda: _random(lambda: nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=CLASSES)),
        "class_layers.relu",
    ),
    "sequential": Network(lambda: _random(_sequential), "14"),
    "unet": Network(lambda: _random(_unet), "0.model.2"),
    "vit": Network(_Transformer, "vit.norm"),
    # Small, but trained, and asked about a real CT.
    "lung-nodule": Network(lambda: _trained().network, "evidence", _nodule),
}


@dataclass(frozen=True)
class Row:
    """One way to call one package."""

    package: str
    """A file in peers/."""
    setting: str = "default"
    """What is not the default, in words."""
    parameters: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """In what its result differs from MedXAI's."""

    @property
    def name(self) -> str:
        return f"{TITLES[self.package]}, {self.setting}"


TITLES = {
    "medxai": "MedXAI",
    "pytorch": "PyTorch",
    "captum": "captum",
    "monai": "MONAI",
    "medcam": "M3d-CAM",
    "grad_cam": "pytorch-grad-cam",
    "torchcam": "torchcam",
    "zennit": "zennit",
    "shap": "shap",
    "lxt": "LXT",
    "lime": "lime",
}


@dataclass(frozen=True)
class Goal:
    """What MedXAI promises: `value`, from the measured rows, is at most or at least `limit`."""

    text: str
    value: Callable[[Rows], float]
    sense: Literal["at most", "at least"]
    limit: float

    def measured(self, rows: Rows) -> dict[str, Any]:
        """What was found, and by which fraction the goal was missed (0 when it was kept); None where a row it needs
        failed or was different work."""
        found: dict[str, Any] = {"text": self.text, "sense": self.sense, "limit": self.limit}
        try:
            value = self.value(rows)
        except (KeyError, TypeError):
            return found | {"value": None, "missed_by": None}
        missed = value / self.limit - 1 if self.sense == "at most" else 1 - value / self.limit
        return found | {"value": value, "missed_by": max(0.0, missed)}


@dataclass(frozen=True)
class Case:
    """A method on some networks. The first row is MedXAI's own, that the others are compared with."""

    title: str
    method: str
    """The class of it in peers/."""
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...]
    sizes: dict[str, int]
    """The side of the volume, in voxels, for each network it is measured on."""
    classes: tuple[int, ...] = (1,)
    tolerance: float = 1e-3
    """Relative L2 distance from the expected map up to which two maps are the same."""
    reference: Row | None = None
    """What the maps of all rows are compared with, where that is not MedXAI's; as good as MedXAI's is good enough."""
    best: int = 0
    """Of so many places where the expected map is highest: how many are among as many of the map? Places are voxels of
    equal value, as windows leave them."""
    reps: int = 3
    processes: int = 1
    """Fresh processes, of which memory and first call are the median: any one may be 30 MB off (the allocator)."""


def _forwards(rows: Rows) -> float:
    return rows["MedXAI, default"]["forwards"]


def _times(name: str) -> Callable[[Rows], float]:
    return lambda rows: rows[name]["ratio"]


def _quantity(quantity: str, name: str) -> Callable[[Rows], float]:
    return lambda rows: rows[name][quantity]


def _over(quantity: str, ours: str, other: str) -> Callable[[Rows], float]:
    """A quantity of one row over that of another, whatever maps they found."""
    return lambda rows: rows[ours][quantity] / rows[other][quantity]


def _elsewhere(case: Case, size: int = 96) -> Case:
    """`case` on networks for which nothing is promised: where peers are right, and where there is no ReLU."""
    return replace(case, sizes={"sequential": size, "lung-nodule": 40, "unet": size}, goals=())


_CAMS = (
    Row("captum", note="stretches the map"),
    Row("torchcam", note="leaves the map at the layer's resolution"),
    Row("monai", note="stretches the map and turns it upside down"),
    Row("monai", "postprocessing off", {"normalise": False}, "stretches the map"),
    Row("medcam", note="stretches and rescales the map"),
    Row("grad_cam", note="stretches (cubic) and rescales the map"),
)


def _integrated_gradients(
    title: str, ours: Row, size: dict[str, int], target: int, reference: int, *steps: int, goals: tuple[Goal, ...] = ()
) -> Case:
    """captum with several numbers of `steps`, 5 at a time (its best setting here), and with its defaults."""

    def equal_error(rows: Rows) -> float:
        """MedXAI's time over captum's at MedXAI's error, found on the line through captum's settings (both scales
        logarithmic, for its error falls as a power of its steps)."""
        measured = [rows[f"captum, n_steps={n}, internal_batch_size=5"] for n in steps]
        points = sorted((math.log(r["error"]), math.log(r["cpu_seconds"])) for r in measured)
        wanted = math.log(rows[ours.name]["error"])
        for (low, slow), (high, fast) in pairwise(points):
            if low <= wanted <= high:
                captum = math.exp(slow + (fast - slow) * (wanted - low) / (high - low))
                return rows[ours.name]["cpu_seconds"] / captum
        raise KeyError("no setting of captum is as accurate")

    return Case(
        title,
        "IntegratedGradients",
        (
            ours,
            Row("captum", note="50 steps in one batch"),
            *(
                Row("captum", f"n_steps={n}, internal_batch_size=5", {"n_steps": n, "internal_batch_size": 5})
                for n in steps
            ),
        ),
        (
            *goals,
            Goal("MedXAI's time over captum's at equal error", equal_error, "at most", 0.7),
        ),
        size,
        classes=(target,),
        tolerance=0.0,
        reference=Row("captum", "", {"n_steps": reference, "internal_batch_size": 5, "method": "riemann_middle"}),
        reps=2,
    )


CASES = {
    "gradcam": Case(
        "Grad-CAM, one class",
        "GradCAM",
        (
            Row("medxai"),
            Row("medxai", "layer left out", {"find_layer": True}),
            *_CAMS,
            Row("medcam", "layer='auto'", {"find_layer": True}, "stretches and rescales the map"),
        ),
        (
            Goal("forwards that MedXAI takes", _forwards, "at most", 1.1),
            Goal("MONAI's time over MedXAI's", _times("MONAI, default"), "at least", 2.5),
            Goal("M3d-CAM's time over MedXAI's", _times("M3d-CAM, default"), "at least", 2.5),
            Goal("pytorch-grad-cam's time over MedXAI's", _times("pytorch-grad-cam, default"), "at least", 2.5),
        ),
        {"resnet18-medicalnet": 96, "densenet121": 96, "resnet18": 96},
        reps=4,
    ),
    "gradcam-ten-classes": Case(
        "Grad-CAM, ten classes",
        "GradCAM",
        (Row("medxai"), *_CAMS),
        (Goal("forwards that MedXAI takes", _forwards, "at most", 2.0),),
        {"resnet18-medicalnet": 96, "densenet121": 96},
        classes=tuple(range(CLASSES)),
    ),
    "gradient": Case(
        "Gradient",
        "Gradient",
        (
            Row("medxai"),
            Row("pytorch", "parameters frozen"),
            Row("captum"),
            Row("monai"),
            Row("monai", "parameters frozen by hand", {"freeze": True}),
        ),
        (
            Goal(
                "MedXAI's time over plain PyTorch's",
                lambda rows: 1 / rows["PyTorch, parameters frozen"]["ratio"],
                "at most",
                1.05,
            ),
            Goal(
                "MedXAI's peak memory over MONAI's",
                lambda rows: rows["MedXAI, default"]["peak_mb"] / rows["MONAI, default"]["peak_mb"],
                "at most",
                0.5,
            ),
        ),
        {"resnet18-medicalnet": 96, "densenet121": 96, "resnet18": 96},
        reps=4,
        processes=3,
    ),
    "integrated-gradients-trained": _integrated_gradients(
        "Integrated gradients, trained network and real CT",
        Row("medxai"),
        {"lung-nodule": 40},
        2,
        1000,
        *(25, 50, 100, 200, 400),
    ),
    "integrated-gradients": _integrated_gradients(
        "Integrated gradients, random weights and noise",
        Row("medxai", "max_steps=45", {"max_steps": 45}),
        {"resnet18-medicalnet": 96},
        1,
        150,
        *(25, 50),
        goals=(
            Goal(
                "MedXAI's peak memory over captum's",
                lambda rows: rows["MedXAI, max_steps=45"]["peak_mb"] / rows["captum, default"]["peak_mb"],
                "at most",
                0.1,
            ),
        ),
    ),
}


_RESNET_AND_DENSENET = {"resnet18-medicalnet": 96, "densenet121": 96}


def _zennit(name: str) -> tuple[Row, ...]:
    """A composite of zennit as it comes, with its own rewriting of ResNets, and with what it takes for MONAI's."""
    return (
        Row("zennit", parameters={"name": name}),
        Row("zennit", "ResNetCanonizer", {"name": name, "rewritten": "zennit"}),
        Row(
            "zennit", "with canonizers for MONAI", {"name": name, "rewritten": "by hand"}, "written for this comparison"
        ),
    )


def _lrp(title: str, composite: str, *others: Row, goal: Goal) -> Case:
    return Case(
        f"LRP, {title}",
        "LRP",
        (Row("medxai", parameters={"composite": composite}), *others),
        (goal,),
        _RESNET_AND_DENSENET,
        # Sums near zero, where every package stabilises in a way of its own.
        tolerance=5e-3,
    )


_LRP_EPSILON = _lrp(
    "epsilon",
    "epsilon",
    Row("pytorch", "gradient times input", note="what the rule comes to where all is ReLU, pooling and batch norm"),
    *_zennit("epsilon"),
    Row("captum"),
    goal=Goal(
        "MedXAI's time over a forward and a backward to the input",
        _over("cpu_seconds", "MedXAI, default", "PyTorch, gradient times input"),
        "at most",
        1.3,
    ),
)
_Z_PLUS = Goal("forwards that MedXAI takes", _forwards, "at most", 5.0)
_LRP_PLUS = _lrp("epsilon-plus", "epsilon_plus", *_zennit("epsilon_plus"), goal=_Z_PLUS)
_LRP_PLUS_FLAT = _lrp("epsilon-plus-flat", "epsilon_plus_flat", *_zennit("epsilon_plus_flat"), goal=_Z_PLUS)
_DEEPLIFT = Case(
    "DeepLIFT",
    "DeepLift",
    (
        Row("medxai"),
        Row("captum"),
        Row("shap"),
        Row("shap", "check_additivity=False", {"check": False}),
    ),
    (Goal("forwards that MedXAI takes", _forwards, "at most", 5.5),),
    _RESNET_AND_DENSENET,
)
_DEEP_SHAP = Case(
    "Deep SHAP, ten baselines",
    "DeepSHAP",
    (
        Row("medxai", parameters={"count": 10}),
        Row("medxai", "one baseline", {"count": 1}, "for its memory"),
        Row("captum", parameters={"count": 10}),
        Row("shap", parameters={"count": 10}),
        Row("shap", "check_additivity=False", {"count": 10, "check": False}),
    ),
    (
        Goal(
            "MedXAI's peak memory with ten baselines over that with one",
            _over("peak_mb", "MedXAI, default", "MedXAI, one baseline"),
            "at most",
            1.2,
        ),
    ),
    # captum would need 20 GB for the DenseNet at 96.
    {"resnet18-medicalnet": 96, "densenet121": 48},
    reps=2,
    processes=3,
)
CASES |= {
    "lrp-epsilon": _LRP_EPSILON,
    "lrp-epsilon-elsewhere": _elsewhere(_LRP_EPSILON),
    "lrp-epsilon-plus": _LRP_PLUS,
    "lrp-epsilon-plus-elsewhere": _elsewhere(_LRP_PLUS),
    "lrp-epsilon-plus-flat": _LRP_PLUS_FLAT,
    "lrp-epsilon-plus-flat-elsewhere": _elsewhere(_LRP_PLUS_FLAT),
    "deeplift": _DEEPLIFT,
    "deeplift-elsewhere": _elsewhere(_DEEPLIFT),
    "deep-shap": _DEEP_SHAP,
    "deep-shap-elsewhere": _elsewhere(_DEEP_SHAP, 64),
    "guided-backprop": Case(
        "Guided backpropagation",
        "GuidedBackprop",
        (
            Row("medxai"),
            Row("captum"),
            Row("monai"),
            Row("medcam", note="rescales the map"),
            Row("zennit"),
        ),
        (),
        {**_RESNET_AND_DENSENET, "sequential": 96, "unet": 96},
    ),
    "deconvnet": Case(
        "Deconvolution",
        "DeconvNet",
        (Row("medxai"), Row("captum"), Row("zennit")),
        (),
        _RESNET_AND_DENSENET,
    ),
    "gradient-shap": Case(
        "Gradient SHAP, ten baselines and forty samples",
        "GradientSHAP",
        tuple(Row(package, parameters={"count": 10, "samples": 40}) for package in ("medxai", "captum", "shap")),
        (
            Goal(
                "MedXAI's error over captum's with as many samples",
                _over("error", "MedXAI, default", "captum, default"),
                "at most",
                1.0,
            ),
        ),
        # captum needs 11 GB at 96.
        {"resnet18-medicalnet": 64, "lung-nodule": 40},
        # Forty random samples are half a map away from the limit; an empty map is 1 away.
        tolerance=0.9,
        reference=Row("captum", "", {"count": 10, "samples": 5, "calls": 60}),
        reps=2,
    ),
    "attention-relevance": Case(
        "Attention relevance",
        "AttentionRelevance",
        (Row("medxai"), Row("lxt", note="its parts put into MONAI's ViT by hand")),
        (),
        {"vit": 96},
        # LXT stabilises nothing that matters.
        tolerance=1e-2,
        reference=Row("medxai", "", {"epsilon": 0.0}),
    ),
}


def _occlusion(network: str, batch: int, faster: float) -> Case:
    """All packages at their defaults and at the `batch` that is best for this network, where it is not the default."""
    place = {"window": 16, "stride": 16}
    loop, peer = Row("pytorch", f"batch {batch}", place | {"batch": batch}), f"MONAI, n_batch={batch}"

    def quickest(rows: Rows) -> float:
        return min(rows[name]["ratio"] for name in (peer, "MONAI, zeros, no activation"))

    return Case(
        "Occlusion, 216 windows of 16 voxels",
        "Occlusion",
        (
            Row("medxai", parameters=place),
            loop,
            Row("captum", parameters=place),
            Row("captum", f"perturbations_per_eval={batch}", place | {"perturbations_per_eval": batch}),
            Row("monai", "zeros, no activation", place),
            Row("monai", f"n_batch={batch}", place | {"n_batch": batch}, "zeros, no activation"),
        ),
        (
            Goal("MONAI's best time over MedXAI's", quickest, "at least", faster),
            Goal("MedXAI's peak memory over MONAI's", _over("peak_mb", "MedXAI, default", peer), "at most", 0.2),
            *(
                Goal(
                    f"largest difference from {name}, in units of the score",
                    _quantity("difference", name),
                    "at most",
                    1e-5,
                )
                for name in (peer, "captum, default", loop.name)
            ),
        ),
        {network: 96},
        reps=2,
    )


_EVERY_8 = {"window": 16, "stride": 8}
_IN_BATCHES = Row("pytorch", "batch 8", _EVERY_8 | {"batch": 8})
_CUBES = {"size": 8}
"""125 of them in the patch that the shipped network looks at."""
_DRAWS = 994
"""Scans asked by four orders of 125 supervoxels, walked both ways, and the two ends."""


def _shapley(package: str, setting: str, estimator: str, note: str = "", **others: Any) -> Row:
    return Row(package, setting, _CUBES | {"estimator": estimator, **others}, note)


_KERNEL_SHAP = _shapley("captum", "KernelShap", "KernelShap", n_samples=_DRAWS)
_PERMUTATIONS = _shapley("medxai", "permutation_shap", "permutation_shap", permutations=4)
CASES |= {
    "occlusion": _occlusion("resnet18-medicalnet", 8, 4.0),
    "occlusion-densenet": _occlusion("densenet121", 4, 3.5),
    "occlusion-top": Case(
        "Occlusion, the ten strongest of 343 windows",
        "Strongest",
        (Row("medxai", "top=10", _EVERY_8 | {"top": 10}), _IN_BATCHES),
        (
            Goal("a batched loop's time over MedXAI's", _times(_IN_BATCHES.name), "at least", 10.0),
            Goal("how many of the ten MedXAI finds", _quantity("found", "MedXAI, top=10"), "at least", 10),
        ),
        {"resnet18-medicalnet": 64},
        # Of the windows that it does not ask about, it says nothing.
        tolerance=1.0,
        reference=replace(_IN_BATCHES, setting=""),
        best=10,
    ),
    "shapley": Case(
        f"Shapley values of 125 cubes, {_DRAWS} evaluations",
        "Shapley",
        (
            _PERMUTATIONS,
            _shapley("medxai", "kernel_shap", "kernel_shap", samples=_DRAWS),
            _KERNEL_SHAP,
            _shapley(
                "captum",
                "KernelShap, perturbations_per_eval=16",
                "KernelShap",
                n_samples=_DRAWS,
                perturbations_per_eval=16,
            ),
            _shapley("captum", "ShapleyValueSampling", "ShapleyValueSampling", n_samples=_DRAWS // 125),
            _shapley(
                "captum",
                "ShapleyValueSampling, perturbations_per_eval=16",
                "ShapleyValueSampling",
                n_samples=_DRAWS // 125,
                perturbations_per_eval=16,
            ),
            _shapley("shap", "PermutationExplainer", "permutation", "takes 251 at a time", max_evals=_DRAWS + 10),
            _shapley("shap", "KernelExplainer", "kernel", "keeps ten cubes", nsamples=_DRAWS),
            _shapley("shap", "KernelExplainer, l1_reg=False", "kernel", nsamples=_DRAWS, l1_reg=False),
        ),
        (
            Goal(
                "MedXAI's error over that of captum's KernelShap",
                _over("error", _PERMUTATIONS.name, _KERNEL_SHAP.name),
                "at most",
                0.5,
            ),
            Goal("time of captum's KernelShap over MedXAI's", _times(_KERNEL_SHAP.name), "at least", 2.5),
        ),
        {"lung-nodule": 40},
        classes=(2,),
        # All are estimates of the same; how far off each is, is what is compared.
        tolerance=math.inf,
        reference=_shapley("medxai", "", "permutation_shap", permutations=60, seed=1),
    ),
    "lime": Case(
        "LIME of 125 cubes, 500 samples",
        "LIME",
        (
            Row("medxai", parameters=_CUBES | {"samples": 500}),
            Row("lime", parameters=_CUBES | {"num_samples": 500}),
            Row(
                "lime",
                "hide_color=0",
                _CUBES | {"num_samples": 500, "hide_color": 0},
                "ridge penalty of 1",
            ),
            Row("captum", parameters=_CUBES | {"n_samples": 500}, note="lasso; weighs by how alike the voxels are"),
            Row(
                "captum",
                "perturbations_per_eval=16",
                _CUBES | {"n_samples": 500, "perturbations_per_eval": 16},
                "lasso; weighs by how alike the voxels are",
            ),
            Row(
                "captum",
                "fit as MedXAI's, perturbations_per_eval=16",
                _CUBES | {"n_samples": 500, "perturbations_per_eval": 16, "same_fit": True},
            ),
        ),
        (),
        {"lung-nodule": 40},
        classes=(2,),
        # As above.
        tolerance=math.inf,
        reference=Row("medxai", "", _CUBES | {"samples": 8000, "seed": 1}),
    ),
}


def network(name: str) -> nn.Module:
    """Network `name` in evaluation mode, the same each time."""
    return NETWORKS[name].build().eval()

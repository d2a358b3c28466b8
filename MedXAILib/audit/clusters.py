"""Do the maps fall into kinds, and do these follow the site?

Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", 2019 (SpRAy).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import SpectralClustering  # type: ignore[import-untyped]
from sklearn.neighbors import kneighbors_graph  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Picture, Test
from MedXAILib.errors import MedXAIError
from MedXAILib.report.localisation import highest
from MedXAILib.run import Run
from MedXAILib.textual.significance import exceeded

TITLE = "Do kinds of maps follow the site?"

# Of what is not known of the site: so much is told by the kind of map.
_LEAST = 0.1

_SIDE, _NEAREST, _MOST, _FEWEST, _EXAMPLES = 10, 10, 8, 20, 3


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """Clusters of the maps by their likeness alone, and what they tell about the group once the class is known."""
    known = np.array([i for i, heat in enumerate(cohort.maps) if heat.sum() > 0])
    if len(known) < _FEWEST:
        raise MedXAIError(f"{len(known)} maps are too few for clusters: give {_FEWEST} or more.")
    cohort, groups = cohort.taken(known), groups.taken(known)
    # Of cases of many sizes as many cells as the smallest has voxels.
    cells = [min(_SIDE, *sides) for sides in zip(*(heat.shape for heat in cohort.maps), strict=True)]
    points = np.stack([_coarse(heat, cells) for heat in cohort.maps])
    cluster = _clustered(points, groups.seed)
    told, unknown = _told(cluster, groups)
    chance = float(told[1:].mean())
    effect = (told - chance) / max(unknown - chance, 1e-12)
    rows, pictures = [], _means(cohort, groups)
    for c in np.unique(cluster):
        inside = np.flatnonzero(cluster == c)
        middle = points[inside].mean(0)
        nearest = inside[np.argsort(((points[inside] - middle) ** 2).sum(1), kind="stable")[:_EXAMPLES]]
        examples = ", ".join(cohort.uids[i] for i in nearest)
        one = {"cluster": int(c) + 1, "cases": len(inside), "examples": examples}
        shares = {name: float((groups.at[inside] == g).mean()) for g, name in enumerate(groups.names)}
        rows.append({**one, **shares})
        most = max(shares, key=lambda name: shares[name])
        group = f"Cluster {c + 1}: {len(inside)} maps, {shares[most]:.0%} of {most}"
        for i in nearest:
            heat = cohort.maps[i]
            pictures.append(Picture(group, cohort.uids[i], cohort.x[i][0], cohort.affines[i], highest(heat), heat))
    says = (
        f"The maps fall into {len(rows)} clusters, which tell {max(effect[0], 0):.0%} of what is not known of the "
        f"{groups.column} once the class is"
    )
    test = Test(says, float(effect[0]), _LEAST, exceeded(told[0], told[1:]), effect[1:])
    return Outcome([test], {"clusters": float(len(rows))}, rows, pictures)


def _coarse(heat: Tensor, shape: Sequence[int]) -> np.ndarray:
    """A map as a point: its shares in `shape` coarse cells, square roots so that distances are those of Hellinger."""
    pool = getattr(functional, f"adaptive_avg_pool{heat.ndim}d")
    cells = pool(heat[None, None].double(), shape).flatten()
    return (cells / cells.sum()).sqrt().numpy()


def _clustered(points: np.ndarray, seed: int) -> np.ndarray:
    """The cluster of each, as many as the widest gap between the eigenvalues of the graph of neighbours says."""
    graph = kneighbors_graph(points, min(_NEAREST, len(points) - 1), include_self=True)
    graph = 0.5 * (graph + graph.T).toarray()
    degree = 1 / np.sqrt(graph.sum(1))
    values = np.linalg.eigvalsh(np.eye(len(graph)) - degree[:, None] * graph * degree)[: _MOST + 1]
    count = int(np.diff(values)[1:].argmax()) + 2
    with warnings.catch_warnings():
        # A graph in parts is clear clusters, and no trouble.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        made = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
        labels = made.fit_predict(graph)
    return np.unique(labels, return_inverse=True)[1]


def _told(cluster: np.ndarray, groups: Groups) -> tuple[np.ndarray, float]:
    """(1 + P,): the information of clusters about groups given the stratum, and the entropy of groups given it."""
    told, unknown = np.zeros(len(groups.draws)), 0.0
    for stratum in np.unique(groups.strata):
        inside = groups.strata == stratum
        kinds = np.eye(cluster.max() + 1)[cluster[inside]]
        joint = np.stack([(groups.draws[:, inside] == g) @ kinds for g in range(len(groups.names))], 1) / len(cluster)
        of_group, of_kind, share = joint.sum(2, keepdims=True), joint.sum(1, keepdims=True), inside.mean()
        told += _plogp(joint, joint * share / np.maximum(of_group * of_kind, 1e-300)).sum((1, 2))
        unknown -= float(_plogp(of_group[0], of_group[0] / share).sum())
    return told, unknown


def _plogp(p: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, of, 1.0)), 0.0)


def _means(cohort: Cohort, groups: Groups) -> list[Picture]:
    """The mean map of each group, each map brought to sum to one, in the plane where groups differ most; none where
    cases differ in size."""
    if len({heat.shape for heat in cohort.maps}) > 1:
        return []
    shares = torch.stack([heat / heat.sum() for heat in cohort.maps])
    scans = torch.stack([x[0] for x in cohort.x])
    of = [torch.from_numpy(groups.at == g) for g in range(len(groups.names))]
    means = torch.stack([shares[own].mean(0) for own in of])
    focus = highest(means.var(0) if len(of) > 1 else means[0])
    title = "Mean map over mean scan, in the plane where they differ most"
    return [
        Picture(title, f"{name}, {int(own.sum())} cases", scans[own].mean(0), cohort.affines[0], focus, mean)
        for name, own, mean in zip(groups.names, of, means, strict=True)
    ]

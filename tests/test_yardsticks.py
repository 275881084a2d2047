"""Neighbours by features that are not there; the yardsticks' formulas are in `test_ablations`."""
import numpy as np
import torch
import torch.nn.functional as F

from ptmrec.yardsticks import feature_knn, keep_largest


def clustered(n=300, d=16, seed=0):
    "Features of 10 clusters in a narrow cone, as a CLIP's are, and each item's cluster."
    draw = torch.Generator().manual_seed(seed)
    cluster = torch.arange(n) % 10
    noise = torch.randn(n, d, generator=draw)
    return 2 * torch.ones(d) + torch.randn(10, d, generator=draw)[cluster] + 0.8 * noise, cluster


def test_items_without_content_are_neighbours_of_nothing():
    features, cluster = clustered()
    lost = torch.arange(300) < 60
    features[lost] = features[~lost].mean(0)
    near = feature_knn(None, {"image": features}, k=10)
    assert not near[lost].any() and not near[:, lost].any()
    assert np.array_equal(near[~lost][:, ~lost], feature_knn(None, {"image": features[~lost]}, k=10))
    item, neighbour = near.nonzero()
    assert (cluster[item] == cluster[neighbour]).float().mean() > 0.8


def test_items_without_a_picture_have_neighbours_by_their_texts():
    (images, _), (texts, _) = clustered(), clustered(seed=1)
    images[:60] = images[60:].mean(0)
    by_text = feature_knn(None, {"text": texts}, k=10)
    assert np.allclose(feature_knn(None, {"image": images, "text": texts}, k=10)[:60], by_text[:60] / 2, atol=1e-6)


def test_where_all_items_have_content_neighbours_are_those_of_the_plain_cosine():
    features = {"image": clustered()[0], "text": clustered(seed=1)[0]}
    unit = [F.normalize(f, dim=1) for f in features.values()]
    plain = keep_largest((sum(f @ f.T for f in unit) / 2).numpy(), 10)
    assert np.array_equal(feature_knn(None, features, k=10), plain)

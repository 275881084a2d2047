"""The diagnosis of whether Stage 2 is worth trying, against plain numpy."""
import numpy as np
import torch
import torch.nn.functional as F

from ptmrec.diagnosis import RIDGE, diagnose, diagnosis_in_words, predict_out_of_fold, shared_neighbours, standardised


def plain_neighbours(x, k):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -9)
    return [set(np.argsort(-row)[:k]) for row in cosine]


def test_shared_neighbours_are_those_of_a_plain_loop():
    a, b = (torch.randn(60, d, generator=torch.Generator().manual_seed(d)) for d in (6, 9))
    near_a, near_b = (plain_neighbours(x.double().numpy(), 5) for x in (a, b))
    expected = [len(x & y) / 5 for x, y in zip(near_a, near_b)]
    assert np.allclose(shared_neighbours(a, b, 5), expected) and 0 < np.mean(expected) < 1


def test_equal_items_have_as_many_neighbours_as_others():
    "None of twenty equal items need be its own nearest; none has more than `k` neighbours for that."
    kind = torch.arange(60) % 3
    same, ids = F.one_hot(kind).float(), torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    assert (shared_neighbours(same, same, 5) == 1).all() and (shared_neighbours(torch.zeros(9, 2), same[:9], 4) <= 1).all()
    for found in (shared_neighbours(ids, same, 5), shared_neighbours(same, ids, 5)):
        near = plain_neighbours(ids.numpy(), 5)
        at_most = torch.tensor([len({j for j in near[i] if kind[j] == kind[i]}) / 5 for i in range(60)])
        assert (found <= at_most + 1e-6).all() and found.any()


def test_what_is_predicted_of_an_item_does_not_depend_on_it():
    x, e = (torch.randn(50, d, generator=torch.Generator().manual_seed(d)) for d in (7, 3))
    x = standardised(x)
    told = predict_out_of_fold(x, e)
    changed = e.clone()
    changed[4] = -5 * e[4] + 1
    again = predict_out_of_fold(x, changed)
    fold = torch.randperm(50, generator=torch.Generator().manual_seed(0)) % 5
    own = fold == fold[4]
    assert torch.equal(again[own], told[own]) and not torch.allclose(again[~own], told[~own])

    fit, unit = x[~own].numpy(), torch.nn.functional.normalize(e.double(), dim=1).numpy()[~own.numpy()]
    augmented = np.vstack([fit, np.sqrt(RIDGE * 50) * np.eye(7)])  # ridge regression as least squares
    W = np.linalg.lstsq(augmented, np.vstack([unit - unit.mean(0), np.zeros((7, 3))]), rcond=None)[0]
    assert np.allclose(told[own], x[own].numpy() @ W + unit.mean(0))


def test_items_without_training_interactions_are_left_out():
    taste, other = (torch.randn(200, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    features, trained = {"image": torch.cat([taste, 3 * other], 1)}, torch.arange(200) < 150
    found = diagnose(taste, features, trained)
    wrong = taste.clone()
    wrong[150:] = 100.0
    assert diagnose(wrong, features, trained) == found and found["items"] == 150
    assert found["difference"] > 0 and diagnosis_in_words(found).startswith(
        "Stage 2 is worth trying on this data, because teaching finds more neighbours.")
    nothing = diagnose(taste, {"image": torch.randn(200, 8, generator=torch.Generator().manual_seed(5))}, trained)
    assert diagnosis_in_words(nothing).startswith("Stage 2 is unlikely to help on this data")


def test_items_without_a_picture_are_left_out():
    "They share the mean feature, and would be each other's nearest."
    taste, other = (torch.randn(200, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    pictures, lost = torch.cat([taste, 3 * other], 1), torch.arange(200) % 20 == 3
    pictures[lost] = pictures[~lost].mean(0)
    found = diagnose(taste, {"image": pictures, "text": other}, torch.arange(200) < 150)
    assert found == diagnose(taste, {"image": pictures, "text": other}, (torch.arange(200) < 150) & ~lost)
    assert found["items"] == 150 - int(lost[:150].sum())


def test_too_few_items_are_said_and_stop_nothing():
    ids, features = (torch.randn(30, d, generator=torch.Generator().manual_seed(d)) for d in (4, 6))
    for n in (2, 8, 11):
        found = diagnose(ids, {"text": features}, torch.arange(30) < n)
        assert found["items"] == n and found["k"] == n - 1 and diagnosis_in_words(found).startswith("Too few items have")
    assert "10 nearest" in diagnosis_in_words(diagnose(ids, {"text": features}, torch.arange(30) < 12))

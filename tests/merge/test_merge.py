"""The merge equals the authors' formula, and reports what it did."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import scipy.linalg
import torch
from pico import WIDTH

from pipeline.merge.compress import rounded, shared_factors, truncated_factors, weighted_factors
from pipeline.merge.constraints import (
    PAPER_PROMPTS,
    Constraint,
    captions_beside,
    constraint_of,
    held_out_rows,
    load_constraints,
    regularization_rows,
    row_count,
    save_constraints,
    unseen_of,
)
from pipeline.merge.factors import SHARED, MergedModel
from pipeline.merge.files import load_change, load_concepts, load_weights, merge_files
from pipeline.merge.solve import Sums, damped_gram, merge, merge_sums, missed, moved, report, solve_soft
from training.checkpoint import load_tensors, save_tensors
from training.weights import ConceptWeights

D, OUTS = 24, {"a.to_k": 16, "a.to_v": 16, "b.to_k": 40}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    regularization = normal(300, D)
    base = {layer: normal(out, D) for layer, out in OUTS.items()}
    trained = [{layer: base[layer] + 0.1 * normal(out, D) for layer, out in OUTS.items()} for _ in range(3)]
    rows = [normal(4, D) for _ in range(3)]
    constraints = [
        Constraint(f"c{i}", rows[i], {layer: rows[i] @ (w[layer] - base[layer]).T for layer in OUTS})
        for i, w in enumerate(trained)
    ]
    return regularization, base, trained, rows, constraints


def naive(regularization, w0, rows, wanted):
    """Equation 4 as the authors compute it: LU of G, one solve a row, an explicit inverse of the small system."""
    gram = regularization.T @ regularization
    lu = scipy.linalg.lu_factor(gram)
    d = np.stack([scipy.linalg.lu_solve(lu, row) for row in rows])
    delta = (wanted.T - w0 @ rows.T) @ np.linalg.inv(d @ rows.T)
    return w0 + delta @ d


def test_the_papers_form_is_the_authors_formula(problem):
    regularization, base, trained, rows, constraints = problem
    model, result = merge(constraints, regularization, base, form="paper", damping=0.0)
    for layer, w0 in base.items():
        wanted = torch.cat([rows[i] @ w[layer].T for i, w in enumerate(trained)])
        expected = naive(regularization.numpy(), w0.numpy(), torch.cat(rows).numpy(), wanted.numpy())
        left, right = model.factors(layer)
        merged = (w0 + left @ right).numpy()
        assert np.abs(merged - expected).max() < 1e-6 * np.abs(expected).max()
        # W C^T = V, row by row
        np.testing.assert_allclose(torch.cat(rows).numpy() @ merged.T, wanted.numpy(), rtol=1e-8, atol=1e-8)
    assert max(result.residuals.values()) < 1e-9 and result.rows == 12


def test_the_papers_form_is_the_constrained_minimum(problem):
    """Any other W that meets the constraints moves the regularisation captions more."""
    regularization, base, _, rows, constraints = problem
    model, _ = merge(constraints, regularization, base, form="paper", damping=0.0)
    left, right = model.factors("a.to_k")
    change = left @ right
    kernel = torch.eye(D, dtype=torch.float64) - torch.linalg.pinv(torch.cat(rows)) @ torch.cat(rows)
    best = (change @ regularization.T).norm()
    for seed in range(5):
        other = change + 0.01 * torch.randn(16, D, generator=torch.Generator().manual_seed(seed)).double() @ kernel
        assert (other @ regularization.T).norm() > best


def test_the_soft_form_solves_its_normal_equations_and_meets_the_papers(problem):
    regularization, base, trained, rows, constraints = problem
    C, gram = torch.cat(rows), regularization.T @ regularization
    mu = 3.0 * gram.diagonal().mean()
    model, _ = merge(constraints, regularization, base, form="soft", damping=0.0, penalty=3.0)
    for layer, w0 in base.items():
        V = torch.cat([rows[i] @ w[layer].T for i, w in enumerate(trained)]).T
        expected = (w0 @ gram + mu * V @ C) @ torch.linalg.inv(gram + mu * C.T @ C)
        left, right = model.factors(layer)
        assert (w0 + left @ right - expected).abs().max() < 1e-6 * expected.abs().max()
    hard, _ = merge(constraints, regularization, base, form="paper", damping=0.0)
    residuals = []
    for penalty in (1.0, 1e2, 1e4, 1e8):
        soft, result = merge(constraints, regularization, base, form="soft", damping=0.0, penalty=penalty)
        residuals.append(max(result.residuals.values()))
    assert residuals == sorted(residuals, reverse=True)
    assert (soft.deltas["b.to_k"] - hard.deltas["b.to_k"]).abs().max() < 1e-5 * hard.deltas["b.to_k"].abs().max()


def test_factors_share_the_right_side_and_have_rank_s(problem):
    regularization, base, _, _, constraints = problem
    model, _ = merge(constraints, regularization, base, form="paper")
    assert set(model.right) == {SHARED} and model.right[SHARED].shape == (12, D)
    assert all(torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= 12 for delta in model.deltas.values())


def test_too_many_rows_and_agreeing_concepts_are_refused(problem):
    regularization, base, _, _, constraints = problem
    many = [Constraint(f"n{i}", c.rows + i, c.changes) for i in range(3) for c in constraints]
    with pytest.raises(ValueError, match=r"36 constraint rows of 9 concepts.*24 wide.*soft"):
        merge(many, regularization, base, form="paper")
    twins = [constraints[0], Constraint("twin", constraints[0].rows, constraints[0].changes)]
    with pytest.raises(ValueError, match=r"c0, twin are not independent.*soft"):
        merge(twins, regularization, base, form="paper")
    for both in (many, twins):
        assert merge(both, regularization, base)[1].drift <= 0.1 + 1e-9


def test_nearly_agreeing_concepts_are_met_at_the_cost_of_everything_else_or_less_closely(problem):
    regularization, base, _, _, constraints = problem
    first, second, _ = constraints
    near = [first, Constraint("near", first.rows + 1e-5 * second.rows, second.changes)]
    exactly = merge(near, regularization, base, form="paper")[1]
    assert max(exactly.residuals.values()) < 1e-3 and exactly.drift > 10
    softly = merge(near, regularization, base)[1]
    assert max(softly.residuals.values()) > 0.3 and softly.drift <= 0.1 + 1e-9


@pytest.mark.parametrize("count", [3, 12], ids=["fewer rows than the text is wide", "more"])
def test_the_penalty_is_the_largest_that_keeps_to_the_drift_allowed(problem, count):
    """So what does not fit is met less, little by little, and from sums as from the concepts themselves."""
    regularization, base, _, _, constraints = problem
    many = [Constraint(f"n{i}", constraints[i % 3].rows + i // 3, constraints[i % 3].changes) for i in range(count)]
    missed = []
    for allowed in (0.1, 0.01, 0.001):
        model, result = merge(many, regularization, base, form="soft", damping=0.0, max_drift=allowed)
        assert result.drift == pytest.approx(allowed, rel=1e-4)
        missed.append(max(result.residuals.values()))
        given = merge(many, regularization, base, form="soft", damping=0.0, penalty=result.penalty)[0]
        summed, of_sums = merge_sums(Sums.over(many), [], regularization, base, damping=0.0, max_drift=allowed)
        assert of_sums.penalty == result.penalty and of_sums.residuals == {}
        for layer in OUTS:
            assert torch.equal(model.deltas[layer], given.deltas[layer])
            assert torch.equal(model.deltas[layer], summed.deltas[layer])
    assert missed == sorted(missed)


def test_a_drift_that_nothing_reaches_leaves_the_penalty_at_its_upper_end(problem):
    regularization, base, _, _, constraints = problem
    small = [Constraint(c.name, c.rows, {k: 1e-3 * v for k, v in c.changes.items()}) for c in constraints]
    _, result = merge(small, regularization, base, form="soft", damping=0.0, max_drift=0.5)
    assert result.penalty == pytest.approx(100) and result.drift < 0.5 and max(result.residuals.values()) < 0.01


@pytest.mark.parametrize("rows", [8, D - 1])
def test_a_singular_gram_matrix_asks_for_damping(problem, rows):
    """Fewer rows than the text features are wide."""
    regularization, base, _, _, constraints = problem
    few = regularization[:rows]
    for form in ("soft", "paper"):
        with pytest.raises(ValueError, match=r"raise merge\.damping"):
            merge(constraints, few, base, form=form, damping=0.0)
    with pytest.raises(ValueError, match=r"raise merge\.damping"):
        merge(constraints[:1], few[:1], base, form="soft", damping=0.0)
    gram = few.T @ few
    with pytest.raises(ValueError, match=r"raise merge\.damping"):
        weighted_factors({"a.to_k": torch.ones(16, D)}, gram)
    assert merge(constraints, few, base, form="paper")[1].form == "paper"


def test_adding_replacing_and_removing_a_concept_is_merging_afresh(problem, tmp_path):
    """From the stored sums and the changed concept's own constraint, without the other concepts' files."""
    regularization, base, _, _, constraints = problem
    gram, scale = damped_gram(regularization, 0.0)
    stored = Sums.over(constraints[:2])
    stored.save(tmp_path / "sums.safetensors")
    save_constraints(tmp_path / "c2.safetensors", constraints[2:])
    (third,) = load_constraints(tmp_path / "c2.safetensors")
    stored = Sums.load(tmp_path / "sums.safetensors")
    cases = {
        "added": (stored + Sums.over([third]), constraints),
        "replaced": (stored - Sums.over(constraints[:1]) + Sums.over([third]), constraints[1:]),
        "removed": (stored - Sums.over(constraints[1:2]), constraints[:1]),
    }
    for sums, afresh in cases.values():
        assert set(sums.names) == {c.name for c in afresh}
        model, _ = solve_soft(sums, gram, 100.0 * scale)
        expected, _ = merge(afresh, regularization, base, form="soft", damping=0.0, penalty=100.0)
        assert model.right[SHARED].shape == expected.right[SHARED].shape == (4 * len(afresh), D)
        for layer in OUTS:
            torch.testing.assert_close(model.deltas[layer], expected.deltas[layer], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="'c2' is not among the 2 concepts merged"):
        stored - Sums.over([third])


def test_lossless_shared_rank_and_smaller_ones(problem):
    regularization, base, _, _, constraints = problem
    gram = regularization.T @ regularization
    model, _ = merge(constraints, regularization, base, form="paper")
    same, error = shared_factors(model, gram, 12)
    assert error < 1e-7
    for layer in OUTS:
        torch.testing.assert_close(same.deltas[layer], model.deltas[layer], rtol=1e-5, atol=1e-7)
    smaller, error = shared_factors(model, gram, 6)
    root = torch.linalg.cholesky(gram)
    lost = sum(((smaller.deltas[k] - model.deltas[k]).double() @ root).square().sum() for k in OUTS)
    kept = sum((model.deltas[k].double() @ root).square().sum() for k in OUTS)
    assert float((lost / kept).sqrt()) == pytest.approx(error, rel=1e-4)
    assert 0 < error < 1


def test_weighted_budget_beats_bare_singular_values_on_text(problem):
    """Same bytes, less error on text features than a truncation of the bare weights."""
    regularization, base, trained, _, _ = problem
    scaled = regularization * torch.logspace(0, -3, D, dtype=torch.float64)
    gram = scaled.T @ scaled
    deltas = {layer: (trained[0][layer] - base[layer]).float() for layer in OUTS}
    budget = 2 * sum(4 * (out + D) for out in OUTS.values())
    ours, error = weighted_factors(deltas, gram, max_bytes=budget)
    assert sum(2 * t.numel() for t in [*ours.left.values(), *ours.right.values()]) <= budget
    root = torch.linalg.cholesky(gram)
    total = sum((d.double() @ root).square().sum() for d in deltas.values())
    plain = 0.0
    for delta in deltas.values():
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        plain += ((delta.double() - (u[:, :4] * s[:4]) @ vh[:4]) @ root).square().sum()
    assert error < float((plain / total).sqrt())
    bare, worse = truncated_factors(deltas, gram, 0.5)
    assert worse > weighted_factors(deltas, gram, max_bytes=2 * sum(t.numel() for t in _tensors(bare)))[1]
    everything, none = weighted_factors(deltas, gram)
    assert none < 1e-6
    torch.testing.assert_close(everything.deltas["b.to_k"], deltas["b.to_k"], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="one rank of every layer costs"):
        weighted_factors(deltas, gram, max_bytes=10)


def _tensors(model: MergedModel) -> list[torch.Tensor]:
    return [*model.left.values(), *model.right.values()]


def test_the_authors_truncation(problem):
    """The fewest largest singular values that hold the share of their sum, at least one; the error is that of weighted
    factors."""
    regularization, base, trained, _, _ = problem
    gram = regularization.T @ regularization
    deltas = {layer: (trained[0][layer] - base[layer]).float() for layer in OUTS}
    root = torch.linalg.cholesky(gram)
    total = sum((d.double() @ root).square().sum() for d in deltas.values())
    for share in (1e-9, 0.6, 1.0):
        model, error = truncated_factors(deltas, gram, share)
        lost = sum(((model.deltas[k] - deltas[k]).double() @ root).square().sum() for k in OUTS)
        assert float((lost / total).sqrt()) == pytest.approx(error, abs=1e-5)
        for layer, delta in deltas.items():
            values = torch.linalg.svdvals(delta.double())
            rank = model.left[layer].shape[1]
            assert rank == model.right[layer].shape[0] >= 1
            assert values[:rank].sum() >= share * values.sum() * (1 - 1e-12)
            assert rank == 1 or values[: rank - 1].sum() < share * values.sum()
    assert truncated_factors(dict.fromkeys(deltas, torch.zeros(5, D)), gram, 0.6)[1] == 0


def test_half_precision_and_files(problem, tmp_path):
    regularization, base, _, _, constraints = problem
    model, _ = merge(constraints, regularization, base, form="paper")
    tokens = {"<new1>": [torch.ones(4)], "<a.b>": [torch.zeros(4), torch.ones(2)]}
    half = rounded(MergedModel(model.left, model.right, tokens, {"base": "x"}))
    half.save(tmp_path / "m.safetensors")
    again = MergedModel.load(tmp_path / "m.safetensors")
    assert again.metadata["base"] == "x" and again.tokens.keys() == tokens.keys()
    assert [len(rows) for rows in again.tokens.values()] == [1, 2] or [len(r) for r in again.tokens.values()] == [2, 1]
    assert all(torch.equal(again.deltas[k], half.deltas[k]) for k in OUTS)
    assert max(report(again, constraints, regularization, base).residuals.values()) < 5e-3
    with pytest.raises(ValueError, match="holds no concept weights"):
        ConceptWeights.load(tmp_path / "m.safetensors")


def _unseen_weights(backbone) -> ConceptWeights:
    row = backbone.text_encoders[0].get_input_embeddings().weight[7].clone()
    deltas = {name: torch.full_like(layer.weight, 0.01) for name, layer in backbone.layers.items()}
    described = [{"name": "c", "token": "<new1>", "class_word": "cat"}]
    return ConceptWeights(deltas, {"<new1>": [row]}, {"concepts": described})


def test_exact_constraint_rows_are_the_concepts_positions(backbone):
    """ "<new1> cat": token, cat, end; "photo of a <new1> cat" adds the same three further on."""
    weights = _unseen_weights(backbone)
    (constraint,) = constraint_of(backbone, weights, exact=True)
    assert constraint.rows.shape == (6, WIDTH)
    with backbone.changed({}, weights.tokens), torch.no_grad():
        hidden = backbone.encode_text(["<new1> cat", "photo of a <new1> cat"]).hidden
    torch.testing.assert_close(constraint.rows, torch.cat([hidden[0, 1:4], hidden[1, 4:7]]).double())
    assert row_count(backbone.tokenizers[0], PAPER_PROMPTS, "cat") == 6
    assert row_count(backbone.tokenizers[0], ("a {} in the snow",), "soccer ball") == 1 + 2 + 3 + 1
    name, delta = next(iter(weights.deltas.items()))
    torch.testing.assert_close(constraint.changes[name], constraint.rows @ delta.double().T)
    assert regularization_rows(backbone, ["a cat", "photo of a dog"], exact=True).shape == (3 + 5, WIDTH)


def test_soft_constraint_rows_are_the_principal_ones_of_all_prompts_and_their_padding(backbone):
    weights = _unseen_weights(backbone)
    prompts = ("{}", "a {} in the snow", "photo of a {}")
    (constraint,) = constraint_of(backbone, weights, prompts)
    parts = []
    with backbone.changed({}, weights.tokens), torch.no_grad():
        for prompt, first, end in (
            ("<new1> cat", 1, 4),
            ("a <new1> cat in the snow", 2, 8),
            ("photo of a <new1> cat", 4, 7),
        ):
            hidden = backbone.encode_text([prompt]).hidden[0].double()
            share = (0.4 * (end - first) / len(hidden[end:])) ** 0.5  # all of the padding counts 0.4 of the words
            parts += [hidden[first:end], share * hidden[end:]]
    gram = torch.cat(parts).T @ torch.cat(parts) / len(prompts)
    kept = constraint.rows.T @ constraint.rows
    assert len(constraint.rows) < 20 and 0.99 <= kept.trace() / gram.trace() <= 1
    values = torch.linalg.eigvalsh(gram).flip(0)
    assert values[: len(constraint.rows) - 1].sum() < 0.99 * values.sum()  # one fewer would be too few
    torch.testing.assert_close(constraint.rows.square().sum(1), values[: len(constraint.rows)], rtol=1e-5, atol=0)


def test_prompts_that_are_too_long_are_left_out_but_for_the_first(backbone):
    weights = _unseen_weights(backbone)
    long = "a {} " + "in the snow " * 20
    (constraint,) = constraint_of(backbone, weights, ("{}", long))
    torch.testing.assert_close(constraint.rows, constraint_of(backbone, weights, ("{}",))[0].rows)
    with pytest.raises(ValueError, match="tokens"):
        constraint_of(backbone, weights, (long, "{}"))
    assert len(unseen_of(backbone, weights)) == 1


def test_captions_that_name_a_new_category_are_not_held_where_they_are():
    captions = ["a cat on a mat", "concatenation", "Photo of a CAT", "a soccer ball", "a ball"]
    new, with_token = {"token": "", "class_word": "cat"}, {"token": "<a>", "class_word": "soccer ball"}
    assert captions_beside(captions, [with_token]) == captions
    assert captions_beside(captions, [new, with_token]) == ["concatenation", "a soccer ball", "a ball"]
    everyday = captions_beside(["a cat"], [new])
    assert "photo of a dog" in everyday and not any("cat" in caption.split() for caption in everyday)


def test_regularization_rows_hold_what_every_image_attends_to(backbone):
    """Begin-of-text, padding that counts twice the words, and one empty prompt for ten captions."""
    rows = regularization_rows(backbone, ["a cat", "photo of a dog"])
    with torch.no_grad():
        hidden = backbone.encode_text(["a cat", "photo of a dog", ""]).hidden.double()
    parts = []
    for own, end in zip(hidden, (4, 6, 2), strict=True):
        parts += [own[:end], own[end:] * (2 * end / len(own[end:])) ** 0.5]
    torch.testing.assert_close(rows, torch.cat(parts))


def test_the_empty_prompt_moves_less_where_it_is_among_the_captions(miniature):
    """At the same drift of the captions' words."""
    captions = [f"{form} {word}" for word in ("cat", "dog", "house", "tree", "car") for form in ("a", "photo of a")]
    weights = [_weights(miniature, name, seed) for seed, name in enumerate(("one", "two", "three"))]
    constraints = [c for each in weights for c in constraint_of(miniature, each)]
    base = {name: layer.weight.data for name, layer in miniature.layers.items()}
    held_out, found = held_out_rows(miniature), {}
    for exact in (True, False):
        rows = regularization_rows(miniature, captions, exact=exact)
        model, _ = merge(constraints, rows, base, max_drift=0.2)
        found[exact] = moved(model, held_out["empty"], base) / moved(model, held_out["words"], base)
    assert found[False] < 0.8 * found[True], found


def test_what_is_missed_and_moved_is_a_share(problem):
    regularization, base, trained, _, constraints = problem
    deltas = {layer: trained[0][layer] - base[layer] for layer in OUTS}
    own = MergedModel(deltas, {layer: torch.eye(D).double() for layer in OUTS}, {})
    none = MergedModel({k: 0 * v for k, v in deltas.items()}, own.right, {})
    twice = MergedModel({k: 2 * v for k, v in deltas.items()}, own.right, {})
    assert [round(missed(model, constraints[0]), 12) for model in (own, none, twice)] == [0, 1, 1]
    assert moved(none, regularization, base) == 0
    assert moved(twice, regularization, base) == pytest.approx(2 * moved(own, regularization, base))
    as_large = MergedModel({k: base[k] for k in OUTS}, own.right, {})
    assert moved(as_large, regularization, base) == pytest.approx(1)


def _weights(backbone, name: str, seed: int, *, token: bool = True) -> ConceptWeights:
    generator = torch.Generator().manual_seed(seed)
    deltas = {k: 0.01 * torch.randn(v.weight.shape, generator=generator) for k, v in backbone.layers.items()}
    width = backbone.text_encoders[0].get_input_embeddings().weight.shape[1]
    described = [{"name": name, "token": f"<{name}>" if token else "", "class_word": "cat"}]
    tokens = {f"<{name}>": [0.1 * torch.randn(width, generator=generator)]} if token else {}
    return ConceptWeights(deltas, tokens, {"concepts": described, "base": backbone.digest})


def test_rounded_factors_meet_constraints_of_text_features(backbone):
    """Their large common part, on which concepts change nothing, has to cancel; of weights in float16 it does not."""
    captions = [f"photo of a {word}" for word in ("cat", "dog", "house", "tree", "car", "bus")]
    regularization = regularization_rows(backbone, captions)
    common = regularization.mean(0) / regularization.mean(0).norm()
    constraints = []
    for i, (name, size) in enumerate((("a", 1), ("b", 0.3), ("c", 0.1))):
        weights = _weights(backbone, name, i)
        deltas = {k: size * (v - (v.double() @ common).outer(common)).float() for k, v in weights.deltas.items()}
        constraints += constraint_of(backbone, dataclasses.replace(weights, deltas=deltas), ("{}", "photo of a {}"))
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}
    for form in ("paper", "soft"):
        model, _ = merge(constraints, regularization, base, form=form)
        small = rounded(model)
        assert max(report(small, constraints, regularization, base).residuals.values()) < 5e-3
    full = {k: (base[k] + delta).half().double() - base[k] for k, delta in model.deltas.items()}
    in_weights = MergedModel({k: torch.eye(len(v)) for k, v in full.items()}, full, {})
    assert max(report(in_weights, constraints, regularization, base).residuals.values()) > 2e-2


def test_a_model_that_is_no_number_meets_nothing(problem):
    regularization, base, _, _, constraints = problem
    model, _ = merge(constraints, regularization, base, form="paper")
    left = model.left | {(layer := model.layers[1]): model.left[layer] * float("nan")}
    residuals = report(MergedModel(left, model.right, {}), constraints, regularization, base).residuals
    assert all(math.isnan(value) for value in residuals.values())


def test_files_are_added_to_and_removed_from_a_merged_model(backbone, pico, tmp_path):
    """With the sums alone, never with the other concepts' files."""
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    for seed, path in enumerate((a, b, c)):
        _weights(backbone, path.stem, seed).save(path)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"photo of a {word}" for word in ("cat", "dog", "house", "tree", "car", "bus")))

    def merged(*paths, sums="sums.safetensors", remove=()):
        file = tmp_path / sums
        made = merge_files(paths, captions, pico, sums=file, remove=remove, out=tmp_path / "m.safetensors")
        return made[0]

    merged(a, b)
    b.rename(tmp_path / "away")
    replaced = merged(c, remove=[a])
    (tmp_path / "away").rename(b)
    afresh = merged(b, c, sums="other.safetensors")
    assert [concept["name"] for concept in replaced.metadata["concepts"]] == ["b", "c"]
    assert set(replaced.tokens) == {"<b>", "<c>"}
    rows = constraint_of(backbone, ConceptWeights.load(b), ("a {} in the snow",))[0].rows
    for layer in backbone.layers:
        done, wanted = (rows @ model.deltas[layer].double().T for model in (replaced, afresh))
        assert (done - wanted).norm() < 2e-3 * wanted.norm()  # both are float16

    # what is told is told of the file
    files, out = [tmp_path / "away", b], tmp_path / "m.safetensors"
    shutil.copy(c, files[0])
    told = merge_files(files, captions, pico, form="paper", out=out)[1]
    constraints = [x for file in files for x in constraint_of(backbone, ConceptWeights.load(file), exact=True)]
    base = {name: layer.weight.data for name, layer in backbone.layers.items()}
    rows = regularization_rows(backbone, captions.read_text().splitlines(), exact=True)
    found = report(MergedModel.load(out), constraints, rows, base)
    assert (told.residuals, told.drift) == (found.residuals, found.drift) and min(found.residuals.values()) > 1e-5

    stamp = (tmp_path / "sums.safetensors").read_bytes()
    for arguments, message in (
        (lambda: merged(c), "'c' is merged already"),
        (lambda: merged(remove=[a]), "are not among the concepts merged"),
        (lambda: merged(remove=[b, c]), "no concept is left; .*sums.safetensors can be deleted"),
        (lambda: merged(sums="none.safetensors"), "no concepts; name their"),
        (lambda: merged(b, sums="none.safetensors", remove=[a]), "are not among the concepts merged"),
        (lambda: merged(a, sums="c.safetensors"), "holds no sums"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments()
    assert (tmp_path / "sums.safetensors").read_bytes() == stamp


def test_only_the_very_file_that_was_added_is_removed(backbone, pico, tmp_path):
    """Also of a new category, which has no token to tell it by."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog\na house")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("gate", "again", "b")}
    _weights(backbone, "gate", 0, token=False).save(files["gate"])
    _weights(backbone, "gate", 1, token=False).save(files["again"])
    _weights(backbone, "b", 2).save(files["b"])

    def merged(*paths, remove=()):
        sums, out = tmp_path / "sums.safetensors", tmp_path / "m.safetensors"
        return merge_files(paths, captions, pico, sums=sums, remove=remove, out=out)[0]

    merged(files["gate"], files["b"])
    with pytest.raises(
        ValueError, match=r"again\.safetensors: these weights of gate are not among the concepts merged"
    ):
        merged(remove=[files["again"]])
    assert [concept["name"] for concept in merged(remove=[files["gate"]]).metadata["concepts"]] == ["b"]


# --- files of strangers ----------------------------------------------------------------------------------


def _first(weights: ConceptWeights, change) -> ConceptWeights:
    name = next(iter(weights.deltas))
    return dataclasses.replace(weights, deltas=weights.deltas | {name: change(weights.deltas[name])})


def _row(weights: ConceptWeights, change) -> ConceptWeights:
    (token,) = weights.tokens
    return dataclasses.replace(weights, tokens={token: change(weights.tokens[token])})


def _said(weights: ConceptWeights, **changes) -> ConceptWeights:
    return dataclasses.replace(weights, metadata=weights.metadata | changes)


DAMAGE = {
    "NaN": (lambda w: _first(w, lambda t: t * float("nan")), "holds values that are not finite"),
    "infinite": (lambda w: _row(w, lambda rows: [rows[0] / 0]), "holds values that are not finite"),
    "int8": (lambda w: _first(w, lambda t: t.to(torch.int8)), "is int8; expected float16, bfloat16, float32, float64"),
    "complex": (lambda w: _first(w, lambda t: t.to(torch.complex64)), "is complex64; expected"),
    "float8": (lambda w: _first(w, lambda t: t.to(torch.float8_e5m2)), "is float8_e5m2; expected"),
    "turned": (lambda w: _first(w, lambda t: t.T.contiguous()), "this base model has"),
    "a vector": (lambda w: _first(w, lambda t: t[0]), "this base model has"),
    "a layer less": (lambda w: dataclasses.replace(w, deltas=dict(list(w.deltas.items())[1:])), "has no change of"),
    "a layer more": (lambda w: dataclasses.replace(w, deltas=w.deltas | {"x": torch.ones(1)}), "none of this name"),
    "wide row": (
        lambda w: _row(w, lambda rows: [torch.ones(7)]),
        r"rows of widths \[7\]; this base model's are \[32\]",
    ),
    "two encoders": (lambda w: _row(w, lambda rows: [rows[0], rows[0].clone()]), r"rows of widths \[32, 32\]"),
    "a matrix of rows": (lambda w: _row(w, lambda rows: [rows[0][None]]), "is no row of a token"),
    "another's row": (
        lambda w: dataclasses.replace(w, tokens={"<x>": [torch.ones(WIDTH)]}),
        r"go by \['<a>'\], but it",
    ),
    "a known word": (
        lambda w: _said(
            dataclasses.replace(w, tokens={"cat": w.tokens["<a>"]}),
            concepts=[{"name": "a", "token": "cat", "class_word": "cat"}],
        ),
        "knows",
    ),
    "another base": (lambda w: _said(w, base="0123"), "made over a base with digest 0123"),
    "no base": (lambda w: _said(w, base=""), "does not say over which base"),
    "no concepts": (lambda w: _said(w, concepts=[]), "names no concepts"),
    "odd concepts": (lambda w: _said(w, concepts=[{"name": 1}]), "names no concepts"),
    "another kind": (lambda w: _said(w, kind="lora"), "holds no concept weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_merged(backbone, tmp_path, damage):
    spoil, message = DAMAGE[damage]
    file = tmp_path / "strange.safetensors"
    spoil(_weights(backbone, "a", 0)).save(file)
    with pytest.raises(ValueError, match=f"strange.safetensors: .*{message}"):
        load_concepts(file, backbone)


def _bytes_of(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_no_file_of_weights(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    (tmp_path / "folder.safetensors").mkdir()
    for name, content, message in (
        ("empty", b"", "not a whole safetensors file"),
        ("text", b"version https://git-lfs.github.com/spec/v1" * 9, "not a whole safetensors file"),
        ("nothing", _bytes_of({}), "holds no merged model"),
        ("no-json", _bytes_of({"__metadata__": {"polyconcept": "{"}}), "is no JSON"),
        ("deep", _bytes_of({"__metadata__": {"polyconcept": "[" * 100_000}}), "is no JSON"),
        ("list", _bytes_of({"__metadata__": {"polyconcept": "[]"}}), "is no JSON object"),
    ):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.safetensors: .*{message}"):
            load_weights(tmp_path / f"{name}.safetensors")
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name}.safetensors: not a regular file"):
            load_weights(tmp_path / f"{name}.safetensors")


def test_factors_are_looked_at_before_they_are_multiplied(backbone, tmp_path):
    """Of rank 1 they are small, whatever matrix they stand for."""
    file = tmp_path / "m.safetensors"
    fits = {name: torch.ones(len(layer.weight), 1) for name, layer in backbone.layers.items()}
    layer = next(iter(fits))
    right, long = {SHARED: torch.ones(1, WIDTH)}, torch.ones(200_000, 1)
    made = {"base": backbone.digest}
    MergedModel(fits, right, {}, made).save(file)
    assert load_change(str(file), backbone)[0].keys() == backbone.layers.keys()
    for model, message in (
        (
            MergedModel(fits | {layer: long}, {SHARED: long.T.clone()}, {}, made),
            r"\(200000, 200000\); this base model has",
        ),
        (MergedModel(fits, {SHARED: torch.ones(2, WIDTH)}, {}, made), r"\(\d+, 1\) and \(2, 32\), do not go together"),
        (MergedModel(fits, {layer: torch.ones(1, WIDTH)}, {}, made), "do not go together"),
        (MergedModel(fits, {SHARED: torch.ones(WIDTH)}, {}, made), "do not go together"),
        (MergedModel(fits, right, {}, {"base": "0123"}), "digest 0123"),
        (MergedModel(fits, right, {}), "does not say over which base"),
        (MergedModel(fits, right, {"<x y>": [torch.ones(WIDTH)]}, made), "token '<x y>': a token is one word"),
        (MergedModel(fits, right, {"<x>": [torch.ones(3)]}, made), "token '<x>' has rows of widths"),
    ):
        model.save(file)
        with pytest.raises(ValueError, match=f"m.safetensors: .*{message}"):
            load_change(str(file), backbone)


def test_concepts_of_strangers(backbone, pico, tmp_path):
    """What cannot be read, as a terminal's escape codes, names no concept, and numbers stay finite."""
    file, captions, good = tmp_path / "b.safetensors", tmp_path / "captions.txt", _weights(backbone, "b", 0)
    captions.write_text("a cat")
    for key in ("name", "class_word"):
        described = [good.metadata["concepts"][0] | {key: "\x1b[31m"}]
        dataclasses.replace(good, metadata=good.metadata | {"concepts": described}).save(file)
        with pytest.raises(ValueError, match=rf"b.safetensors: the {key} of a concept is '\\x1b\[31m'"):
            merge_files([file], captions, pico, out=tmp_path / "out.safetensors")
    tokens = {"<b>": [3e38 * row.sign() for row in good.tokens["<b>"]]}
    dataclasses.replace(good, tokens=tokens).save(file)
    with pytest.raises(ValueError, match=r"b.safetensors: its numbers are too large"):
        merge_files([file], captions, pico, out=tmp_path / "out.safetensors")


def test_sums_of_strangers(backbone, pico, tmp_path):
    captions, sums, out = (tmp_path / name for name in ("captions.txt", "sums.safetensors", "m.safetensors"))
    captions.write_bytes(b"\xef\xbb\xbfa cat\na dog\na house")
    _weights(backbone, "a", 0).save(tmp_path / "a.safetensors")
    merge_files([tmp_path / "a.safetensors"], captions, pico, sums=sums, out=out)
    tensors, metadata = load_tensors(sums)
    cross = next(name for name in tensors if name.startswith("cross."))
    for changed, said, message in (
        ({"gram": tensors["gram"] * float("nan")}, {}, "'gram' holds values that are not finite"),
        ({"gram": tensors["gram"][:3]}, {}, "no 'gram' of the shape"),
        ({cross: tensors[cross].T.contiguous()}, {}, "no 'cross.* of the shape"),
        ({}, {"merged": "{}"}, "not what `merge --sums` writes"),
        ({}, {"rows": "many"}, "not what `merge --sums` writes"),
        ({}, {"merged": metadata["merged"].replace("class_word", "word")}, "names no concepts"),
    ):
        save_tensors(sums, tensors | changed, metadata | said)
        with pytest.raises(ValueError, match=f"sums.safetensors: .*{message}"):
            merge_files([], captions, pico, sums=sums, out=out)
    captions.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"captions.txt:1: cannot be read as text: byte 0xff is not UTF-8"):
        merge_files([tmp_path / "a.safetensors"], captions, pico, out=out)


def test_new_categories_are_merged_by_their_words(backbone, pico, tmp_path):
    """Each of its own; two of one word are one word to the model."""
    captions, out = tmp_path / "captions.txt", tmp_path / "m.safetensors"
    captions.write_text("a cat\na dog\na house")
    files = {}
    for seed, (name, word) in enumerate((("a", "moongate"), ("b", "skybus"), ("c", "Moongate"))):
        files[name] = tmp_path / f"{name}.safetensors"
        described = [{"name": name, "token": "", "class_word": word}]
        _said(_weights(backbone, name, seed, token=False), concepts=described).save(files[name])
    model, told = merge_files([files["a"], files["b"]], captions, pico, form="paper", out=out)
    assert [concept["class_word"] for concept in model.metadata["concepts"]] == ["moongate", "skybus"]
    assert model.tokens == {} and max(told.residuals.values()) < 0.05
    with pytest.raises(ValueError, match=r"c.safetensors: class word of a new category 'moongate' is that of .* 'a'"):
        merge_files(files.values(), captions, pico, out=out)


@pytest.mark.parametrize(("first", "second"), [("<new1>", "<NEW1>"), ("<caf\u00e9>", "<Cafe\u0301>")])
def test_tokens_that_are_one_word_to_the_tokenizer(backbone, pico, tmp_path, first, second):
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog\na house")
    files = []
    for name, token in (("a", first), ("b", second)):
        files.append(tmp_path / f"{name}.safetensors")
        weights = dataclasses.replace(_weights(backbone, name, 0), tokens={token: [torch.ones(WIDTH)]})
        _said(weights, concepts=[{"name": name, "token": token, "class_word": "cat"}]).save(files[-1])
    with pytest.raises(ValueError, match=r"b.safetensors: token .* is that of the concept 'a' too"):
        merge_files(files, captions, pico, out=tmp_path / "m.safetensors")

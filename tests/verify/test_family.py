"""The harness's checks of starts of more than a draw: who is asked, and what is refused."""

import numpy as np
import pytest
from often import once_each, one_in

from lorax_np.verify.batteries import BATTERIES
from lorax_np.verify.batteries.family import WAYS
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.subjects import reference

CHECKS = "started", "starting"


def verdicts(subject, check, profile="fp32", seed=0, only=""):
    """The verdict of each check by its id."""
    return {c.id: c for found in BATTERIES[check](subject, profile, seed, "full", only) for c in found}


class Stranger:
    """Right starts, written from the papers' definitions: OLoRA, CorDA and EVA, with NumPy's factorisations."""

    def __init__(self):
        self.right = reference()

    def run(self, case, gy):
        return self.right.run(case, gy)

    def init_from(self, W, config, seed, given):
        start, r, s = config.init_lora_weights, config.r, config.scaling
        wide = W.astype("float64")
        if start == "olora":
            Q, R = np.linalg.qr(wide)
            A, B = -R[:r], -Q[:, :r]  # as right as the other sign
        elif start == "eva":
            X = given["inputs"].astype("float64")
            _, V = np.linalg.eigh(np.cov(X.T))
            A, B = V[:, ::-1][:, :r].T, np.zeros((len(W), r))
        elif start == "corda":
            X = given["inputs"].astype("float64")
            C = X.T @ X / len(X)
            C += 0.01 * np.mean(np.diagonal(C)) * np.eye(len(C))
            U, S, Vh = np.linalg.svd(wide @ C, full_matrices=False)
            part = slice(r) if config.corda_config["corda_method"] == "ipm" else slice(len(S) - r, None)
            A, B = (
                np.sqrt(S[part] / s)[:, None] * (Vh[part] @ np.linalg.inv(C)),
                U[:, part] * np.sqrt(S[part] / s),
            )
        else:
            raise NotImplementedError(f"no {start} here")
        A, B = A.astype(W.dtype), B.astype(W.dtype)
        base = wide - s * B.astype("float64") @ A
        found = {"A": A, "B": B, "W": base.astype(W.dtype)}
        if config.use_dora:
            found["m"] = np.linalg.norm(base + s * B.astype("float64") @ A, axis=1).astype(W.dtype)
        return found


@pytest.mark.parametrize(("check", "profile"), once_each(CHECKS, ["fp32", "fp64"]))
def test_the_engine_passes_all_and_a_stranger_what_it_offers(check, profile):
    """Signs, and the split of CorDA's values between A and B, are nobody's law."""
    for seed in range(4):
        assert {c.verdict for c in verdicts(reference(), check, profile, seed).values()} == {"pass"}
        found = verdicts(Stranger(), check, profile, seed)
        bad = {id: c.note for id, c in found.items() if c.verdict not in ("pass", "not run")}
        assert not bad
        starts = {way.partition("/")[0] for way in WAYS}
        run = {name for name in starts for id, c in found.items() if f"/{name}" in id and c.verdict == "pass"}
        assert run == {"olora", "eva", "corda"}


@pytest.mark.parametrize("check", CHECKS)
def test_who_has_no_such_starts_is_not_asked(check):
    class Without:
        def run(self, case, gy):
            return reference().run(case, gy)

    assert not verdicts(Without(), check)


@pytest.mark.parametrize("check", CHECKS)
def test_one_check_can_be_asked_for(check):
    ids = verdicts(reference(), check)
    assert len(ids) >= 2 * len(WAYS)
    one = next(iter(ids))
    assert list(verdicts(reference(), check, only=one)) == [one]


@pytest.mark.parametrize("id", one_in(3, [id for id, fault in CATALOGUE.items() if fault.kind == "family"]))
def test_a_fault_is_refused_where_it_is_and_nowhere_else(id):
    """By both checks, each time in the starts that it is planted in."""
    fault = CATALOGUE[id]
    start = fault.subject().start
    for check in CHECKS:
        found = verdicts(fault.subject(), check)
        refused = {name for name, c in found.items() if c.verdict == "fail"}
        assert refused
        assert all(f"/{start}" in name for name in refused)
        assert not any(c.verdict == "crash" for c in found.values())


def test_what_is_no_start_is_a_crash_with_its_reason():
    class Odd(Stranger):
        def init_from(self, W, config, seed, given):
            return {"A": np.ones((config.r, W.shape[1]))}

    found = verdicts(Odd(), "started")
    assert {c.verdict for c in found.values()} == {"crash"}
    assert "init: expected B as floating (20, 4), got none" in found["started/olora/0"].note

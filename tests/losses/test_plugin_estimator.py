"""An estimator from outside the package: its gradient is that of its definition on dense logits."""

import pytest
import torch

from first_trl import register_estimator
from first_trl.losses import Estimator, fused_sparse_kl, sparse_kl_reference
from tests.support.registrations import registered_only_here


@pytest.fixture(scope="module", autouse=True)
def estimator():
    with registered_only_here():
        # Imported here: importing registers
        from tests.support.plugins import estimator

        yield estimator


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradient_of_the_fused_loss_is_autograd_of_the_reference(ce_weight, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 40))
    ids = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in range(9)])
    mass = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    mass[::2, 2] = 0.0  # padding
    log_mass = (mass / mass.sum(-1, keepdim=True)).log()
    options = {
        "tail_log_target": log_mass[:, 3], "labels": ids[:, 0], "estimator": "squared_error", "ce_weight": ce_weight,
    }  # fmt: skip
    results = []
    for fused in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        if fused:
            extra = {"final_logit_softcapping": softcap, "chunk_size": 4}
            loss = fused_sparse_kl(*inputs, ids, log_mass[:, :3], **options, **extra).loss
        else:
            logits = inputs[0] @ inputs[1].T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = sparse_kl_reference(logits, ids, log_mass[:, :3], **options).loss
        loss.backward()
        results.append((loss.detach(), *(tensor.grad for tensor in inputs)))
    assert results[0][1].abs().max() > 1e-3
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_taken_name_and_a_wrong_target_are_refused(estimator):
    assert estimator.SquaredError.__name__ == "SquaredError"
    with pytest.raises(ValueError, match="The estimator 'topk' is there already"):
        register_estimator("topk")(Estimator)
    with pytest.raises(ValueError, match="must be 'kept', 'tail' or 'draws'"):
        register_estimator("other", target="bucket")

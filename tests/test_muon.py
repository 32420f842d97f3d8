"""muon.py against torch.optim.Muon, the singular value decomposition, and itself on a GPU."""

import pytest
import torch
from torch import nn

from muon import Muon, orthogonalise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_torchs_muon_and_takes_a_kernel_as_the_matrix_of_its_patches(dtype):
    weights = [torch.randn(6, 4, 3, 3), torch.randn(40, 4, 3, 3), torch.randn(16, 8), torch.randn(16, 8),
               torch.randn(8, 16)]
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for kernel in parameters[:2]:
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
    flat = [nn.Parameter(weight.flatten(1).clone()) for weight in weights]
    ours = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.3, dtype=dtype)
    theirs = torch.optim.Muon(flat, lr=0.1, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(parameters, flat):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1)
        ours.step(), theirs.step()
    for p, q, start in zip(parameters, flat, weights):
        assert (p.flatten(1) - q).norm() < 0.025 * (q - start.flatten(1)).norm()


def test_a_group_that_is_added_later_is_trained_as_one_from_the_start():
    weights = [torch.randn(16, 8), torch.randn(8, 16)]
    together, later = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    muons = [Muon([dict(params=together[:1]), dict(params=together[1:])], lr=0.1), Muon(later[:1], lr=0.1)]
    with pytest.raises(ValueError, match="biases"):
        muons[1].add_param_group(dict(params=[nn.Parameter(torch.zeros(3))]))
    muons[1].add_param_group(dict(params=later[1:]))
    for p, q in zip(together, later):
        p.grad = torch.randn_like(p)
        q.grad = p.grad
    for muon in muons:
        muon.step()
    for p, q, start in zip(together, later, weights):
        assert torch.equal(p, q) and not torch.equal(p, start)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_muon_is_one_launch_and_steps_as_on_a_cpu():
    weights = [torch.randn(40, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(16, 8), torch.randn(16, 8)]
    here, there = ([nn.Parameter(weight.to(device).clone()) for weight in weights] for device in ("cpu", "cuda"))
    on_cpu, on_gpu = (Muon(parameters, lr=0.1, momentum=0.9) for parameters in (here, there))
    for step in range(4):
        for optimizer in (on_cpu, on_gpu):  # no graph may have captured a learning rate or a momentum
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            if step == 2:
                optimizer.load_state_dict(dict(optimizer.state_dict(), state={}))
        for p, q in zip(here, there):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()  # each time in another place
        on_cpu.step(), on_gpu.step()
        assert isinstance(on_gpu.work[0][1].__self__, torch.cuda.CUDAGraph)
    for p, q, start in zip(here, there, weights):
        assert (p - q.cpu()).norm() < 0.025 * (p - start).norm()


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonalising_keeps_the_singular_vectors_and_makes_the_values_about_one(shape):
    matrices = torch.randn(shape)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    inside = U.mT @ orthogonalise(matrices) @ V.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    assert inside.diagonal(dim1=1, dim2=2).min() > 0.68 and inside.max() < 1.21


def test_a_parameter_that_muon_is_not_for_is_refused():
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="biases"):
        Muon(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no gradient"):
        Muon([layer.weight], lr=0.1).step()

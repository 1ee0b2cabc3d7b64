import pytest
import torch

from nim4.train.muon import BLOCK_ROWS, UPDATE_RMS, MuonAdamW, orthogonalised


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_orthogonalised_keeps_the_singular_vectors_and_evens_the_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalised(x)
    assert y.shape == x.shape
    evened = u.mT @ y @ v.mT
    torch.testing.assert_close(evened, torch.diag_embed(evened.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
    large = values > 0.05 * values[:, :1]  # the smallest need more iterations
    assert 0.6 < float(evened.diagonal(dim1=1, dim2=2)[large].min()) <= float(evened.diagonal(dim1=1, dim2=2).max()) < 1.3


def test_matrices_are_stepped_by_muon_and_the_rest_by_adamw():
    torch.manual_seed(0)
    matrix, other, idle = (torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (8, 24), (8, 8)))
    twin = torch.nn.Parameter(other.detach().clone())
    gradient = torch.randn(8, 24)
    muon = MuonAdamW([{"params": [matrix, idle], "muon": True}, {"params": [other], "muon": False}], lr=0.1, weight_decay=0.0)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    before, kept = matrix.detach().clone(), idle.detach().clone()
    matrix.grad, other.grad, twin.grad = gradient.clone(), gradient.clone(), gradient.clone()
    muon.step()
    adamw.step()
    expected = before - 0.1 * UPDATE_RMS * 24**0.5 * orthogonalised(gradient[None])[0]
    torch.testing.assert_close(matrix.detach(), expected)
    assert torch.equal(other, twin)
    assert torch.equal(idle, kept)


def test_matrices_are_taken_in_blocks_of_rows():
    """Three blocks in one matrix are stepped as three matrices are."""
    torch.manual_seed(0)
    gradient = torch.randn(3 * BLOCK_ROWS, 32)
    whole = torch.nn.Parameter(torch.zeros(3 * BLOCK_ROWS, 32))
    parts = [torch.nn.Parameter(torch.zeros(BLOCK_ROWS, 32)) for _ in range(3)]
    whole.grad = gradient.clone()
    for part, own in zip(parts, gradient.split(BLOCK_ROWS), strict=True):
        part.grad = own.clone()
    MuonAdamW([{"params": [whole, *parts], "muon": True}], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))
    assert float(whole.detach().square().mean().sqrt()) == pytest.approx(0.1 * UPDATE_RMS, rel=0.3)

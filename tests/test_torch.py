"""The network against the same one in PyTorch, with autograd and its optimizers."""

import numpy as np
import pytest

import mnist_resnet9 as m

torch = pytest.importorskip("torch")
F = torch.nn.functional


def tensors(params):
    """Our parameters in PyTorch's shapes: convolutions (K, C, 3, 3), linear (10, F)."""
    out = {}
    for name, a in params.items():
        a = np.transpose(a, (3, 2, 0, 1)) if a.ndim == 4 else a.T
        out[name] = torch.tensor(np.ascontiguousarray(a), requires_grad=True)
    return out


def ours(tensor):
    a = tensor.detach().numpy()
    return a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T


def logits(p, images, pool, mask=None):
    x = torch.tensor((images.astype(float) / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]
    pool2d = F.max_pool2d if pool == "max" else F.avg_pool2d

    def conv(x, i):
        return F.conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1)

    h = conv(F.relu(conv(x, 1)), 2).relu()
    h = pool2d((h + conv(conv(h, 3).relu(), 4)).relu(), 2)
    h = conv(conv(h, 5).relu(), 6).relu()
    h = pool2d((h + conv(conv(h, 7).relu(), 8)).relu(), 2)
    features = h.permute(0, 2, 3, 1).flatten(1)
    features = features if mask is None else features * torch.tensor(mask)
    return F.linear(features, p["fc9.weight"], p["fc9.bias"])


def batch(rng, N=8):
    return rng.integers(0, 256, (N, 28, 28)).astype(np.uint8), rng.integers(0, 10, N)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_logits_loss_and_all_gradients_agree(rng, pool, dropout):
    settings = m.Settings(pool=pool, dropout=dropout)
    images, labels = batch(rng)
    params = m.init_params(settings, np.float64)
    params.flat += 0.01 * rng.standard_normal(params.flat.size)
    stream = m.shard_streams(np.random.default_rng(5), 1)[0]
    _, mask = m.dropout(np.ones((len(images), 3136)), dropout, stream)
    p = tensors(params)
    expected = logits(p, images, pool, mask)
    expected_loss = F.cross_entropy(expected, torch.tensor(labels))
    expected_loss.backward()
    loss, gradients = m.loss_and_gradients(params, images, labels, settings, np.random.default_rng(5))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    if not dropout:
        np.testing.assert_allclose(m.predict(params, images, settings), expected.detach().numpy(), rtol=1e-9, atol=1e-12)
    for name, gradient in gradients.items():
        reference = ours(p[name].grad)
        assert np.linalg.norm(gradient - reference) < 1e-9 * np.linalg.norm(reference), name


def test_float32_fast_path_agrees_to_a_thousandth(rng):
    images, labels = batch(rng, 16)
    params = m.init_params(m.Settings())
    p = tensors({name: a.astype(float) for name, a in params.items()})
    F.cross_entropy(logits(p, images, "max"), torch.tensor(labels)).backward()
    gradients = m.loss_and_gradients(params, images, labels, m.Settings())[1]
    reference = np.concatenate([ours(p[name].grad).ravel() for name in params])
    assert np.linalg.norm(gradients.flat - reference) < 1e-3 * np.linalg.norm(reference)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ten_steps_stay_together(rng, optimizer):
    settings = m.Settings(optimizer=optimizer, pool="avg", channels=(4, 16, 16, 16))
    images, labels = batch(rng, 4)
    params = m.init_params(settings, np.float64)
    state = m.State(params, np.zeros((2, params.flat.size)), None)
    p = tensors(params)
    if optimizer == "sgd":
        theirs = torch.optim.SGD(p.values(), lr=1e-3, momentum=0.9)
    else:
        theirs = torch.optim.Adam(p.values(), lr=1e-3)
    for _ in range(10):
        theirs.zero_grad()
        F.cross_entropy(logits(p, images, "avg"), torch.tensor(labels)).backward()
        theirs.step()
        m.update(state, m.loss_and_gradients(params, images, labels, settings)[1], settings, 1e-3)
    for name in params:
        np.testing.assert_allclose(params[name], ours(p[name]), rtol=1e-8, atol=1e-8)


def test_a_tie_in_max_pooling_sends_the_gradient_to_all_of_ours_and_one_of_theirs():
    x = torch.full((1, 1, 2, 2), 3.0, requires_grad=True)
    F.max_pool2d(x, 2).backward(torch.full((1, 1, 1, 1), 5.0))
    _, cache = m.max_pool2d(np.full((2, 2, 1, 1), 3.0))
    dx = m.max_pool2d_backward(np.full((1, 1, 1, 1), 5.0), cache)
    assert sorted(x.grad.numpy().ravel()) == [0, 0, 0, 5] and (dx == 5).all()

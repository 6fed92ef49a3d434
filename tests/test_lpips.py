"""Proves that LPIPS, read from files with the real names, equals the lpips package on random weights, reads the weights
that come with the package, and has finite gradients everywhere."""

import os

import pytest
import torch

from autoencoder import LPIPS, load_lpips


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """torchvision's file (legacy format, as the real one) and LPIPS's own, with random weights."""
    torch.manual_seed(0)
    folder, weights = tmp_path_factory.mktemp("lpips"), LPIPS().state_dict()
    vgg = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    own = {f"lin{i}.model.1.weight": weights[f"lin.{i}.weight"].abs() for i in range(5)}  # trained ones are positive
    torch.save(vgg | {"classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)},
               folder / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(own, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


@pytest.mark.parametrize("size", [(32, 32), (40, 72)])
def test_equals_the_lpips_package(files, size):
    lpips = pytest.importorskip("lpips")
    with torch.device("meta"):
        reference = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    vgg, own = torch.load(files[0]), torch.load(files[1])
    # The package numbers VGG's layers as torchvision does, divided into five parts.
    reference.load_state_dict(own | {name: vgg[f"features.{name.split('.', 2)[2]}"] for name in reference.state_dict()
                                     if name.startswith("net.")}, strict=False, assign=True)
    ours, images, others = load_lpips(*files), *(torch.rand(2, 2, 3, *size) * 2 - 1)
    expected = reference(images, others).flatten()
    torch.testing.assert_close(ours(images, others), expected, rtol=1e-4, atol=1e-7)
    assert ours(images, images).abs().max() == 0 and expected.min() > 1e-3


def test_the_weight_file_of_the_package_is_read(files):
    package = pytest.importorskip("lpips")
    ours = load_lpips(files[0], os.path.join(os.path.dirname(package.__file__), "weights", "v0.1", "vgg.pth"))
    assert [len(layer.weight[0]) for layer in ours.lin] == [64, 128, 256, 512, 512]
    assert min(layer.weight.min() for layer in ours.lin) >= 0


def test_it_is_frozen_and_finite_even_where_all_channels_are_zero(files):
    ours = load_lpips(*files)
    assert not any(p.requires_grad for p in ours.parameters())
    for layer in ours.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(-100)  # every channel is 0 after the ReLU: no direction to scale to length 1
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = ours(image, torch.ones(1, 3, 32, 32)).sum()
    distance.backward()
    assert distance.isfinite() and image.grad.isfinite().all()


def test_files_in_the_wrong_order_are_named(files):
    with pytest.raises(SystemExit, match='Missing key.*"lin.0.weight"') as caught:
        load_lpips(files[1], files[0])
    assert str(files[1]) in str(caught.value) and "\n" not in str(caught.value)

"""Proves that LPIPS, read from files with the real names, equals the lpips package on random weights."""

import pytest
import torch

from autoencoder import LPIPS, load_lpips
from data import InputError

lpips = pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory):
    """torchvision's file (legacy format, as the real one) and LPIPS's own, written from the reference's weights."""
    folder = tmp_path_factory.mktemp("lpips")
    own = {name: tensor for name, tensor in reference.state_dict().items() if name.startswith("lin") and
           not name.startswith("lins")}
    for tensor in own.values():
        tensor.uniform_(0, 1)  # trained ones are not negative
    vgg = {f"features.{name.split('.')[2]}.{name.split('.')[3]}": tensor
           for name, tensor in reference.state_dict().items() if name.startswith("net.slice")}
    vgg |= {"classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)}
    torch.save(vgg, folder / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(own, folder / "vgg.pth")
    assert len(own) == 5 and len(vgg) == 28
    return folder / "vgg16.pth", folder / "vgg.pth"


@pytest.mark.parametrize("size", [(32, 32), (40, 72)])
def test_equals_the_lpips_package(reference, files, size):
    ours = load_lpips(*files)
    images, others = torch.rand(2, 2, 3, *size) * 2 - 1
    expected = reference(images, others).flatten()
    torch.testing.assert_close(ours(images, others), expected, rtol=1e-4, atol=1e-7)
    assert ours(images, images).abs().max() == 0 and ours(images, others).min() > 1e-3


def test_it_is_frozen_and_finite_even_where_all_channels_are_zero(files):
    ours = load_lpips(*files)
    assert not any(p.requires_grad for p in ours.parameters())
    with torch.no_grad():  # all channels 0 after the ReLU: no direction to scale to length 1
        for layer in ours.features:
            if isinstance(layer, torch.nn.Conv2d):
                layer.bias.fill_(-100)
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = ours(image, torch.ones(1, 3, 32, 32)).sum()
    distance.backward()
    assert distance.isfinite() and image.grad.isfinite().all()


def test_the_package_s_own_weight_file_has_the_names_that_we_read(files):
    import os
    ours = load_lpips(files[0], os.path.join(os.path.dirname(lpips.__file__), "weights", "v0.1", "vgg.pth"))
    assert [len(layer.weight[0]) for layer in ours.lin] == [64, 128, 256, 512, 512]
    assert min(layer.weight.min() for layer in ours.lin) >= 0


def test_files_in_the_wrong_order_and_tiny_images_are_one_line_errors(files):
    with pytest.raises(InputError, match='Missing key.*"lin.0.weight".*"classifier.0.weight"') as caught:
        load_lpips(files[1], files[0])
    assert str(files[1]) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="16x16"):
        LPIPS()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))

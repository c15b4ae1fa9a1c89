"""Masks against pictures whose classes are known by construction, and the ways to bring a mask to latent size."""

import importlib.util
from hashlib import file_digest
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import keyanon  # noqa: F401  (before transformers: it makes torchvision importable)
from keyanon.channel.pixels import from_pil, to_bytes, to_floats
from keyanon.faces.finding import Finder
from keyanon.faces.parsing import (
    CLASSES,
    PAPER_CLASSES,
    REGIONS,
    TIGHT,
    WITH_HAIR,
    BiSeNetParser,
    EllipseParser,
    LandmarkParser,
    SegFormerParser,
    face_outline,
    reduce_mask,
)
from keyanon.types import FaceParser
from keyanon.weights import Card, Release, missing, named
from tests.test_finding import Sees, seen

ROOT = Path(__file__).parents[1]


def own_card(file: Path) -> Card:
    with file.open("rb") as opened:
        digest = file_digest(opened, "sha256").hexdigest()
    return Card("tiny", file.name, Release(file.as_uri()), digest, "none", "nothing", "test")


def colour_parser(path: Path, classes: int = 19) -> Card:
    """A graph that calls red skin, green hair, blue neck, yellow glasses and black background."""
    weight = np.zeros((classes, 3, 1, 1), np.float32)
    bias = np.full(classes, -100, np.float32)
    for channel, name in enumerate(("skin", "hair", "neck")):
        weight[CLASSES.index(name) % classes, channel] = 1
        bias[CLASSES.index(name) % classes] = 0
    weight[CLASSES.index("eye_g"), :2] = 0.6  # more than red or green alone where both are
    bias[[0, CLASSES.index("eye_g")]] = 0
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "weight", "bias"], ["output"])],
        "colours",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 512, 512])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", classes, 512, 512])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path)
    return own_card(path)


def stripes() -> torch.Tensor:
    """Quarters of 16 columns: red, green, blue, black."""
    image = torch.full((1, 3, 64, 64), -1.0)
    for channel in range(3):
        image[:, channel, :, 16 * channel : 16 * channel + 16] = 1
    return image


def columns(mask: torch.Tensor) -> list[bool]:
    """Whether the centre of each of four stripes is in the mask."""
    return mask[0, 0, mask.shape[2] // 2, mask.shape[3] // 8 :: mask.shape[3] // 4].tolist()


def test_the_label_map():
    assert len(CLASSES) == 19
    assert [CLASSES.index(name) for name in ("skin", "eye_g", "ear_r", "neck", "hair", "hat")] == [1, 6, 9, 14, 17, 18]
    assert len(PAPER_CLASSES) == 13
    assert set(CLASSES) - set(PAPER_CLASSES) == {"background", "ear_r", "neck_l", "cloth", "hair", "hat"}
    assert set(WITH_HAIR) - set(PAPER_CLASSES) == {"hair"}
    assert REGIONS["glasses"] == ("eye_g",)
    assert set(PAPER_CLASSES) - set(TIGHT) == {"l_ear", "r_ear", "neck"}


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("tight", [True, False, False, False]),
        ("paper", [True, False, True, False]),
        ("with_hair", [True, True, True, False]),
    ],
)
def test_bisenet_takes_the_classes_of_its_region(tmp_path, region, expected):
    card = colour_parser(tmp_path / "colours.onnx")
    parser = BiSeNetParser(region, card=card, weights=str(tmp_path / "colours.onnx"))
    assert isinstance(parser, FaceParser)
    mask = parser.mask(torch.cat([stripes(), stripes().flip(-1)]), (32, 32))
    assert mask.shape == (2, 1, 32, 32)
    assert mask.dtype == torch.bool
    assert columns(mask[:1]) == expected
    assert columns(mask[1:]) == expected[::-1]
    assert torch.equal(parser.mask(stripes(), (32, 32)), mask[:1])
    assert parser.cards()[0] == card


def test_networks_see_pictures_as_they_are_given(tmp_path):
    """Neither rounded nor clipped: red that is brighter than white outweighs yellow, in 8 bits it does not."""
    card = colour_parser(tmp_path / "colours.onnx")
    parser = BiSeNetParser("glasses", card=card, weights=str(tmp_path / "colours.onnx"))
    image = stripes()[..., :16].clone()
    image[:, 1] = 1  # yellow
    bright = image.clone()
    bright[:, 0] = 3
    assert parser.mask(image, (64, 16)).all()
    assert not parser.mask(bright, (64, 16)).any()
    assert parser.mask(to_floats(to_bytes(bright)), (64, 16)).all()


def test_the_whole_picture_is_seen_where_it_is_asked_for(tmp_path):
    """Of two faces, each in its own square: what is red beside them counts only where the picture is seen as a whole."""
    two = tuple(seen(np.array(box)) for box in ([4.0, 4, 12, 12], [50.0, 50, 58, 58]))
    finder = Finder("all", Sees(two), Sees(()), Sees(()))
    card = colour_parser(tmp_path / "colours.onnx")
    whole, each = (
        BiSeNetParser(looks_at=looks_at, card=card, weights=str(tmp_path / "colours.onnx"), finder=finder)
        for looks_at in ("picture", "faces")
    )
    red = torch.full((1, 3, 64, 64), -1.0)
    red[:, 0] = 1
    assert whole.mask(red, (64, 64)).all()
    assert 0.02 < each.mask(red, (64, 64)).float().mean() < 0.3


def test_glasses_are_found_apart_from_the_face(tmp_path):
    card = colour_parser(tmp_path / "colours.onnx")
    image = stripes()
    image[:, 1, :, :8] = 1  # half of the red stripe is yellow
    glasses, face = (
        BiSeNetParser(region, card=card, weights=str(tmp_path / "colours.onnx")).mask(image, (64, 64))
        for region in ("glasses", "tight")
    )
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[:, :8] = True
    assert (glasses[0, 0] ^ expected).float().mean() < 0.03  # bilinear: the border's columns
    assert (glasses <= face).all()
    assert columns(face) == [True, False, False, False]


def test_a_network_with_other_classes_is_no_face_parser(tmp_path):
    card = colour_parser(tmp_path / "eleven.onnx", classes=11)
    with pytest.raises(ValueError, match=r"eleven\.onnx.*19 classes.*11"):
        BiSeNetParser(card=card, weights=str(tmp_path / "eleven.onnx")).mask(stripes(), (8, 8))


def tiny_segformer(folder: Path, names: list[str]) -> Card:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[8],
        hidden_sizes=[8],
        patch_sizes=[7],
        strides=[4],
        num_attention_heads=[1],
        mlp_ratios=[1],
        decoder_hidden_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return own_card(folder / "model.safetensors")


def test_segformer_finds_classes_by_name_in_its_own_order(tmp_path):
    from transformers import SegformerForSemanticSegmentation

    order = [*CLASSES[:2], "nose", *(name for name in CLASSES[2:] if name != "nose")]
    card = tiny_segformer(tmp_path, order)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    masks = {
        region: SegFormerParser(region, "nearest", card, str(tmp_path)).mask(image, (512, 512)) for region in REGIONS
    }

    model = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    large = torch.nn.functional.interpolate(image / 2 + 0.5, (512, 512), mode="bilinear")
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = model((large - mean[:, None, None]) / deviation[:, None, None]).logits
    labels = torch.nn.functional.interpolate(logits, (512, 512), mode="bilinear").argmax(1)
    there = {order[index] for index in labels.unique().tolist()}
    for region, classes in REGIONS.items():
        expected = torch.tensor([name in classes for name in order])[labels]
        assert (masks[region][:, 0] == expected).float().mean() > 0.999
    assert len(there) > 1  # otherwise nothing was tested


def test_a_segformer_without_the_classes_says_which(tmp_path):
    card = tiny_segformer(tmp_path, [f"LABEL_{index}" for index in range(19)])
    with pytest.raises(ValueError, match=r"no class .*skin.*LABEL_0"):
        SegFormerParser(card=card, weights=str(tmp_path)).mask(stripes(), (8, 8))
    assert SegFormerParser().cards()[0] == named("segformer")


# To latent size


def test_one_face_pixel_counts_for_the_authors_only():
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[0, 0, 32, 32] = True
    cells = {how: reduce_mask(mask, (8, 8), how).sum().item() for how in ("bilinear>0", "nearest", "area>0.5")}
    assert cells["bilinear>0"] >= 1
    assert cells["area>0.5"] == 0


def test_whole_cells_stay_and_the_authors_way_dilates_by_one_cell():
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 16:40, 24:48] = True
    cells = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    cells[..., 2:5, 3:6] = True
    dilated = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    dilated[..., 1:6, 2:7] = True
    assert torch.equal(reduce_mask(mask, (8, 8), "area>0.5"), cells)
    assert torch.equal(reduce_mask(mask, (8, 8), "nearest"), cells)
    assert torch.equal(reduce_mask(mask, (8, 8), "bilinear>0"), dilated)


def test_the_authors_way_is_torchvision_s_resize():
    from torchvision.transforms.functional import resize

    mask = torch.rand(2, 1, 128, 128, generator=torch.Generator().manual_seed(0)) > 0.98
    assert torch.equal(reduce_mask(mask, (64, 64), "bilinear>0"), resize(mask.float(), [64, 64]) > 0)


@pytest.mark.parametrize("how", ["bilinear>0", "nearest", "area>0.5"])
def test_all_or_nothing_stays(how):
    assert reduce_mask(torch.ones(1, 1, 50, 50, dtype=torch.bool), (16, 16), how).all()
    assert not reduce_mask(torch.zeros(1, 1, 50, 50, dtype=torch.bool), (16, 16), how).any()


@pytest.mark.parametrize("make", [BiSeNetParser, SegFormerParser, LandmarkParser, EllipseParser])
def test_an_unknown_reduction_or_region_is_refused(make):
    with pytest.raises(ValueError, match=r"reduce='area'.*bilinear>0, nearest, area>0\.5"):
        make(reduce="area")
    if make in (BiSeNetParser, SegFormerParser):
        with pytest.raises(ValueError, match=r"'hair'.*with_hair"):
            make(region="hair")


# Landmarks and shapes


def landmarks() -> np.ndarray:
    """A face 100 px from chin to brows: a half circle of jaw, level brows."""
    angles = np.linspace(np.pi, 0, 17)
    jaw = np.stack([100 + 80 * np.cos(angles), 150 + 80 * np.sin(angles)], 1)
    brows = np.stack([np.linspace(40, 160, 10), np.full(10, 130.0)], 1)
    return np.concatenate([jaw, brows, np.zeros((41, 2))])


def test_the_forehead_is_a_fraction_of_the_height_from_chin_to_brows():
    for forehead in (0.0, 0.4, 0.5):
        outline = face_outline(landmarks(), forehead)
        assert outline[:, 1].max() == pytest.approx(230)
        assert outline[:, 1].min() == pytest.approx(130 - 100 * forehead, abs=1)
        assert outline[:, 0].min() == pytest.approx(20)


@pytest.mark.weights
def test_the_landmark_mask_lies_on_the_face():
    reason = missing(named("dlib_landmarks68"))
    if reason or importlib.util.find_spec("dlib") is None:
        pytest.skip(reason or "dlib is not installed")
    data = pytest.importorskip("skimage.data")
    image = from_pil(PIL.Image.fromarray(data.astronaut()).crop((96, 0, 352, 256)))
    images = torch.stack([image, torch.zeros_like(image)])
    parser = LandmarkParser(forehead=0.4, reduce="nearest")
    mask = parser.mask(images, (256, 256))
    assert mask.shape == (2, 1, 256, 256)
    assert not mask[1].any()
    assert mask[0, 0, 113, 131]  # the nose
    assert not mask[0, 0, 20, 20]
    assert 0.05 < mask[0].float().mean() < 0.25
    tight = LandmarkParser(forehead=0.0, reduce="nearest", finder=parser.finder).mask(images, (256, 256))
    assert (tight <= mask).all()
    assert tight.sum() < mask.sum()
    assert torch.equal(parser.mask(images[:1], (32, 32)), parser.mask(images, (32, 32))[:1])
    assert parser.cards() == (named("dlib_landmarks68"),)


def test_the_ellipse_is_the_ellipse():
    parser = EllipseParser(centre=(0.5, 0.5), axes=(0.3, 0.4), reduce="nearest")
    mask = parser.mask(torch.zeros(2, 3, 200, 100), (200, 100))
    assert mask.shape == (2, 1, 200, 100)
    assert mask[0].float().mean() == pytest.approx(np.pi * 0.3 * 0.4, rel=0.01)
    assert torch.equal(mask, mask.flip(-1))
    assert torch.equal(mask[0], mask[1])
    assert parser.cards() == ()


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "parser").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_parser_config_is_made_without_weights(path, monkeypatch, tmp_path):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    finder = {"_target_": "keyanon.faces.finding.Finder"}
    for protocol in (ROOT / "conf" / "protocol").glob("*.yaml"):
        others = {"finder": finder, "protocol": OmegaConf.load(protocol)}
        parser = instantiate(OmegaConf.merge(others, {"parser": OmegaConf.load(path)}).parser)
        assert isinstance(parser, FaceParser)
    assert all(isinstance(card, Card) for card in parser.cards())

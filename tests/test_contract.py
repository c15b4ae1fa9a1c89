"""What every part promises, held against every YAML of its group in conf/. New files are found by themselves.

Models are tiny and steps few; a part that needs weights or programs which are not here is skipped, with its own message.
"""

import random
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.harness import preflight
from experiments.harness.errors import user_error
from keyanon.attacks.views import by_view, without_authentication
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.keys import MasterKey, experiment_key, write_new_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.context import NONCE_BYTES, Context
from keyanon.diffusion.solvers import DDIM, Known, NoiseSchedule
from keyanon.errors import UserError
from keyanon.faces.datasets import bundled_faces
from keyanon.types import (
    Anonymizer,
    Authenticates,
    Dataset,
    FaceParser,
    Image,
    Key,
    KeyedNoise,
    Measure,
    Picture,
    Published,
    Recognizer,
    Reconstructs,
    RecoversFloats,
    Reversible,
    RunsWithoutKey,
    SetScorer,
    Source,
    View,
    declared,
)
from tests.conftest import ROOT

CONF = ROOT / "conf"
SIZE, IDS = 64, ["a", "b", "c"]
KEY, OTHER = experiment_key(0), experiment_key(1)
# What takes long, made short wherever a config has it: of solvers and inversions, of the refinement, of its repetition.
SHORT = {"steps": 2, "skip": 0, "mask_delay": 1, "tolerance": 0.01, "descent": 2, "rounding": 3, "attempts": 1}


def names(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found
    return found


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    shorten(cfg)
    return cfg


def shorten(node: Any) -> None:
    if OmegaConf.is_dict(node):
        if "tolerance" in node:
            node.max_evaluations = 5  # random networks need not converge
        for name in list(node):
            if name in SHORT and isinstance(node._get_node(name)._value(), int | float):
                node[name] = SHORT[name]
            else:
                shorten(node._get_node(name))


def made(node: Any, **settings: Any) -> Any:
    """The part of a config; the test is skipped where something that it needs is not here."""
    part = instantiate(node, _convert_="all", **settings)
    if problems := preflight.missing_parts(part):
        pytest.skip(problems[0].splitlines()[0])
    return part


@pytest.fixture(scope="module")
def faces() -> Image:
    """Synthetic faces as files have them; the last one is turned upside down."""
    dataset = bundled_faces(SIZE)
    pictures = torch.stack([dataset.load(id) for id in dataset.ids[: len(IDS)]])
    pictures[-1] = pictures[-1].flip(1)
    return to_floats(to_bytes(pictures))


# Anonymizers, and the exact one's variants


@dataclass(frozen=True)
class Case:
    method: Anonymizer
    pictures: Image
    published: Published

    def anonymized(self, rows: list[int], key: Key = KEY) -> Published:
        return self.method.anonymize(self.pictures[rows], [key] * len(rows), [IDS[row] for row in rows])

    def file(self, row: int) -> Published:
        floats = self.published.floats
        return Published(
            self.published.images[row : row + 1],
            self.published.headers[row : row + 1],
            None if floats is None else floats[row : row + 1],
        )


@pytest.fixture(
    scope="module",
    params=[f"anonymizer={name}" for name in names("anonymizer")] + [f"+ablation={name}" for name in names("ablation")],
)
def case(request, faces, tiny_block_dct) -> Case:
    model = ["backbone=faces128", f"backbone.source={tiny_block_dct}", "+backbone.chunk=1"]
    cfg = composed(request.param, "parser=ellipse", *model)
    method = made(cfg.anonymizer)
    before = faces.clone()
    published = method.anonymize(faces, [KEY] * len(IDS), IDS)
    assert torch.equal(faces, before), "the originals were changed"
    return Case(method, faces, published)


def reversible(case: Case) -> Reversible:
    if not isinstance(case.method, Reversible):
        pytest.skip("irreversible")
    return case.method


def test_a_method_publishes_bytes_and_headers_of_each_picture(case):
    published, shape = case.published, case.pictures.shape
    assert published.images.dtype == torch.uint8
    assert published.images.shape == shape
    assert published.images.device.type == "cpu"
    assert len(published.headers) == len(IDS)
    assert published.floats is None or (published.floats.shape == shape and published.floats.isfinite().all())
    for values in published.measured.values():
        assert values.shape == (len(IDS),)


def test_a_method_says_what_it_is(case):
    about = case.method.about
    assert isinstance(case.method, Anonymizer)
    assert all(asdict(about)[name] for name in ("kind", "recovery_input", "code_licence", "weights_licence", "source"))
    assert (about.kind in ("keyed", "keyless")) == isinstance(case.method, Reversible)
    assert (about.kind == "keyed") == (about.key_bits is not None) == (about.effective_key_bits is not None)
    assert (about.recovery_input == "-") != isinstance(case.method, Reversible)


def test_the_same_key_gives_the_same_bytes_in_any_batch(case):
    """Of networks alone the CPU's kernels may differ in the last bit, which moves a byte by one at most."""
    for rows in ([2, 0, 1], [1]):
        other = case.anonymized(rows)
        assert (other.images.int() - case.published.images[rows].int()).abs().max() <= 1
        if torch.equal(other.images, case.published.images[rows]):
            assert list(other.headers) == [case.published.headers[row] for row in rows]


def test_headers_are_headers(case):
    for header in case.published.headers:
        if case.method.about.kind == "keyed":
            assert len(Header.unpack(header).nonce) == NONCE_BYTES
        else:
            assert header == b""


def test_recovery_reads_the_files_and_leaves_them_as_they_are(case):
    method = reversible(case)
    images = case.published.images.clone()
    recovered = method.recover(Published(images, case.published.headers), [KEY] * len(IDS))
    assert torch.equal(images, case.published.images), "the files were changed"
    assert recovered.shape == case.pictures.shape
    assert recovered.isfinite().all()
    assert recovered.device.type == "cpu"
    torch.testing.assert_close(method.recover(case.file(1), [KEY])[0], recovered[1], atol=1e-3, rtol=0)


def test_another_key_is_refused_or_recovers_something_else(case):
    method = reversible(case)
    if case.method.about.kind != "keyed":
        pytest.skip("no key")
    recovered = method.recover(case.published, [KEY] * len(IDS))
    keys = [KEY, OTHER, KEY]
    if isinstance(method, Authenticates):
        assert method.authenticate, "the config does not authenticate"
        with pytest.raises(BadHeader, match="picture 2 of 3"):
            method.recover(case.published, keys)
        mixed = without_authentication(method).recover(case.published, keys)
        assert not torch.equal(to_bytes(mixed[1]), to_bytes(recovered[1]))
        torch.testing.assert_close(mixed[0], recovered[0], atol=1e-3, rtol=0)
    other = case.anonymized([0], OTHER)
    assert other.headers[0] != case.published.headers[0]


def test_whatever_a_header_holds_it_is_recovered_or_refused_in_a_line(case):
    """A sender who has the key and is no keyanon: each part of a header is junk, of another size, or missing, under a good tag."""
    method, file = reversible(case), case.file(0)
    if not file.headers[0]:
        pytest.skip("no header")
    right, draw = Header.unpack(file.headers[0]), random.Random(0)
    junk = [b"", draw.randbytes(7), zlib.compress(bytes(10**6))]
    masks = [
        None,
        *(torch.rand(1, *size) > 0.5 for size in ((1, 1), (8, 8), (256, 3))),
        torch.zeros(1, 8, 8) > 0,
        torch.ones(1, 8, 8) > 0,
    ]
    headers = [replace(right, **{part: value}) for part in ("sent", "seam", "residual") for value in junk]
    headers += [replace(right, mask=mask) for mask in masks]
    headers += [replace(right, sent=draw.randbytes(len(right.sent)), seam=draw.randbytes(len(right.seam)))]
    headers += [
        replace(right, description=told) for told in (None, b"{}", b'{"method":null}', b'{"method":{"class":[]}}')
    ]
    for header in headers:
        sealed = seal([replace(header, tag=b"")], file.images, [KEY], authenticate=True)
        try:
            recovered = method.recover(replace(file, headers=sealed), [KEY])
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert recovered.shape == file.images.shape
            assert recovered.isfinite().all()


def test_hooks_do_what_they_promise(case):
    method, shape, keys = case.method, case.pictures.shape, [KEY] * len(IDS)
    if isinstance(method, RunsWithoutKey):
        assert method.without_key(case.published).shape == shape
    if isinstance(method, Reconstructs):
        assert method.reconstruct(case.pictures).shape == shape
    if isinstance(method, RecoversFloats):
        receiver = without_authentication(reversible(case))
        floats, pixels = case.published.floats, to_floats(case.published.images)
        assert receiver.recover_floats(case.published, keys, floats, floats).shape == shape
        as_bytes = receiver.recover_floats(case.published, keys, pixels, pixels)
        torch.testing.assert_close(as_bytes, receiver.recover(case.published, keys))


def test_who_knows_the_method_computes_all_but_the_key(case):
    """With the right key, what anyone computes from the files is what the receiver does."""
    method, headers, keys = case.method, case.published.headers, [KEY] * len(IDS)
    if not isinstance(method, KeyedNoise):
        pytest.skip("keys no noise")
    if getattr(method, "residual", None) is not None:
        pytest.skip("its headers carry a part of the latent")
    encoded = method.encoded_pictures(case.published)
    zT, mask = method.noise(encoded, headers)
    assert encoded.shape == case.pictures.shape
    assert mask.shape == (len(IDS), 1, *zT.shape[2:])
    assert torch.equal(method.undo(zT, torch.zeros_like(mask), headers, keys), zT)
    back = method.redraw(encoded, headers, method.undo(zT, mask, headers, keys))
    torch.testing.assert_close(back, method.recover(case.published, keys), atol=1e-3, rtol=0)


# Solvers


@dataclass(frozen=True)
class GaussianData:
    """eps of data that are N(0, deviation^2): z_t ~ N(0, a^2 deviation^2 + s^2), and eps = s z / that variance."""

    schedule: NoiseSchedule
    deviation: float = 0.5

    def __call__(self, z: torch.Tensor, t: int) -> torch.Tensor:
        abar = self.schedule.abar[t]
        return (1 - abar) ** 0.5 * z / (abar * self.deviation**2 + 1 - abar)


@pytest.mark.parametrize("name", names("solver"))
def test_solver(name):
    solver = made(compose_solver(name))
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    schedule = NoiseSchedule(tuple((1 - betas).cumprod(0).tolist()))
    eps, z0 = GaussianData(schedule), 0.5 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a, s = zip(*solver.levels(schedule), strict=True)
    assert a[0] > 0.99
    assert list(a) == sorted(a, reverse=True)
    assert list(s) == sorted(s)
    assert [x**2 + y**2 for x, y in zip(a, s, strict=True)] == pytest.approx([1.0] * len(a))
    path = solver.invert(eps, schedule, z0)
    assert len(path) == len(a)
    assert torch.equal(path[0], z0)
    assert path[-1].std() == pytest.approx(1, abs=0.3)  # ten steps are off by a quarter
    assert torch.equal(solver.invert(eps, schedule, z0[1:])[-1][0], path[-1][1]), "depends on the batch"
    back = solver.sample(eps, schedule, path[-1])
    exact = isinstance(solver, DDIM) and solver.tolerance is not None
    assert (back - z0).norm() / z0.norm() < (1e-4 if exact else 0.1)
    known = Known(torch.zeros(2, 1, 8, 8, dtype=torch.bool), path)
    assert torch.equal(solver.sample(eps, schedule, torch.zeros_like(z0), known), z0), (
        "what is known was not written back"
    )


def compose_solver(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"solver={name}"]).solver


# Parsers, recognizers, scorers


@pytest.fixture(scope="module")
def portraits() -> Image:
    """Two synthetic faces and a black picture, at the size that the bundled model has."""
    dataset = bundled_faces(128)
    pictures = [dataset.load(id) for id in dataset.ids[:2]]
    return torch.stack([*pictures, torch.full_like(pictures[0], -1)])


@pytest.mark.parametrize("name", names("parser"))
def test_parser(name, portraits):
    parser = made(composed(f"parser={name}").parser)
    assert isinstance(parser, FaceParser)
    for size in ((128, 128), (16, 16)):
        mask = parser.mask(portraits, size)
        assert mask.dtype == torch.bool
        assert mask.shape == (3, 1, *size)
        assert mask[0].any()
    assert torch.equal(parser.mask(portraits[1:2], (16, 16))[0], mask[1])


@pytest.mark.parametrize("name", names("recognizers"))
def test_recognizer(name, portraits):
    recognizer = made(composed(f"recognizers=[{name}]").recognizers[name])
    assert isinstance(recognizer, Recognizer)
    rows = recognizer.embed(portraits)
    assert rows.shape[0] == 3
    assert rows[:2].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert rows[2].isnan().all()
    torch.testing.assert_close(recognizer.embed(portraits[1:2])[0], rows[1])
    assert rows[0] @ rows[1] < 0.999


@pytest.mark.parametrize("name", names("scorers"))
def test_scorer(name, portraits):
    scorer = made(composed(f"scorers=[{name}]").scorers[name])
    assert isinstance(declared(scorer), Measure)
    if isinstance(scorer, SetScorer):
        clean, other = scorer.embed(portraits), scorer.embed(portraits.flip(2))
        assert len(clean) == len(portraits)
        assert scorer.compare(clean, clean) == (pytest.approx(0, abs=1e-6), len(clean))
        assert scorer.compare(other, clean)[0] > 1e-6
        return
    original = portraits[:2]
    everywhere = torch.ones(2, 1, 128, 128, dtype=torch.bool)
    face = made(composed("parser=ellipse").parser).mask(original, (128, 128))
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    equal, *worse = (scorer((original + level * noise).clamp(-1, 1), original, face) for level in (0, 0.1, 0.3, 1))
    for scores in (equal, *worse):
        assert scores.shape == (2,)
        assert scores.isfinite().all()
    higher = declared(scorer).direction in ("alike", "higher")
    assert all((w <= equal if higher else w >= equal).all() for w in worse), "equal pictures are the best"
    noisy = (original + 0.3 * noise).clamp(-1, 1)
    of_face = torch.where(face, noisy, original)
    looks_at_faces_alone = not torch.equal(scorer(of_face, original, face), scorer(of_face, original, everywhere))
    assert scorer(noisy, original, torch.zeros_like(face)).isnan().all() == looks_at_faces_alone


# Attacks


@pytest.fixture(scope="module")
def keyed(faces, tiny_ldm) -> tuple[Reversible, Published]:
    overrides = ["backbone=ldm_ffhq", f"backbone.source={tiny_ldm}", "backbone.subfolder=''", "parser=ellipse"]
    method = made(composed("anonymizer=signflip", *overrides).anonymizer)
    return method, method.anonymize(faces, [KEY] * len(IDS), IDS)


@pytest.mark.parametrize("name", names("attacks"))
def test_attack(name, keyed):
    (method, published), keys = keyed, [KEY] * len(IDS)
    alone = Published(published.images[1:2], published.headers[1:2], published.floats[1:2])
    before = published.images.clone()
    views = by_view(made(composed(f"attacks=[{name}]").attacks))
    assert views
    for attack in views.values():
        assert isinstance(declared(attack), View)
        made_of_all = attack(published, keys, method)
        assert torch.equal(published.images, before), "the files were changed"
        assert made_of_all.shape == published.images.shape
        assert made_of_all.isfinite().all()
    torch.testing.assert_close(attack(alone, keys[:1], method)[0], made_of_all[1], atol=1e-3, rtol=0)


# Datasets


def read(dataset: Dataset) -> list[str]:
    return [*dataset.ids, *dataset.gallery]


@pytest.mark.parametrize("name", names("dataset"))
def test_dataset(name):
    node = composed(f"dataset={name}").dataset
    try:
        dataset = instantiate(node, _convert_="all")
        read(dataset)
    except Exception as error:
        message = user_error(error)
        assert message is not None, "absent data are no bug"
        assert "Set dataset.root=" in message or "pip install" in message
        pytest.skip(message)
    assert isinstance(dataset, Dataset)
    assert list(dataset.ids) == list(instantiate(node, _convert_="all").ids)
    for ids in (dataset.ids, dataset.gallery):
        assert len(set(ids)) == len(ids)
    for id in [*dataset.ids[:1], *dataset.gallery[:1]]:
        picture = dataset.load(id)
        assert picture.shape == (3, node.size, node.size)
        assert picture.dtype == torch.float32
        assert -1 <= picture.min() < picture.max() <= 1
        assert torch.equal(picture, dataset.load(id))
        assert dataset.source(id).read()
        assert dataset.identity(id) is None or dataset.identity(id)


@pytest.mark.parametrize(
    "name", [name for name in names("dataset") if "root:" in (CONF / f"dataset/{name}.yaml").read_text()]
)
def test_a_dataset_that_is_not_here_says_what_to_do(name, tmp_path):
    for root in ("null", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"Set dataset\.root="):
            read(instantiate(composed(f"dataset={name}", f"dataset.root={root}").dataset, _convert_="all"))


# Keys and nonces


@pytest.mark.parametrize("name", names("key"))
def test_key(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KEYANON_PASSWORD", "what key=password reads")
    node = composed(f"key={name}").key
    cheap = {"salt": bytes(16).hex(), "path": str(tmp_path / "key")}
    write_new_key(tmp_path / "key")
    key, again = (instantiate(node, **{name: value for name, value in cheap.items() if name in node}) for _ in range(2))
    assert isinstance(key, Key)
    assert isinstance(key, MasterKey)
    stream = key.stream(Context(bytes(NONCE_BYTES)), "signs", 33)
    assert len(stream) == 33
    assert again.stream(Context(bytes(NONCE_BYTES)), "signs", 33) == stream
    others = [key.stream(Context(bytes(23) + b"\1"), "signs", 33), key.stream(Context(bytes(NONCE_BYTES)), "norms", 33)]
    assert len({stream, *others, experiment_key(7).stream(Context(bytes(NONCE_BYTES)), "signs", 33)}) == 4
    assert key.secret.hex() not in repr(key)


class TwoPeople:
    ids = ("a1", "a2", "b1")
    gallery = ()

    def identity(self, id: str) -> str | None:
        return id[0]

    def source(self, id: str) -> Source:
        return Source(Path(__file__))  # which draws the pictures

    def load(self, id: str) -> Picture:
        return torch.zeros(3, SIZE, SIZE)


@pytest.mark.parametrize("name", names("nonce"))
def test_nonces(name, faces):
    node = composed(f"nonce={name}").nonce
    nonces = instantiate(node, **({"dataset": TwoPeople()} if "dataset" in node else {}))
    first, again, same_person = (nonces(KEY, b"", id, faces[0]) for id in ("a1", "a1", "a2"))
    assert len(first) == NONCE_BYTES
    assert first == again
    assert nonces(OTHER, b"", "a1", faces[0]) != first
    assert (nonces(KEY, b"", "b1", faces[1]) == first) <= (same_person == first)

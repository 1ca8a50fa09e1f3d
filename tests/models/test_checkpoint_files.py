"""Files of a checkpoint that somebody else wrote."""

import json

import pytest

from gqa_kernels.models.checkpoint_files import INDEX, check_links, weight_files


def write_index(folder, *names):
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", 3, None])
def test_names_that_lead_out(tmp_path, name):
    write_index(tmp_path, name)
    with pytest.raises(ValueError, match="must name files in its own folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_what_is_no_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="must be an index with a weight_map"):
        weight_files(tmp_path)


def test_each_file_once_in_order(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["b.safetensors", "a.safetensors"]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a.safetensors not found"):
        weight_files(tmp_path)


def test_links(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "config.json").write_text("{}")
    (folder / "same.json").symlink_to("config.json")
    check_links(folder)
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"got a link: tokenizer.json"):
        check_links(folder)


def test_snapshots_of_the_cache_are_links(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    for each in (snapshot, blobs):
        each.mkdir(parents=True)
    (blobs / "abcd").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    check_links(snapshot)
    (snapshot / "other.json").symlink_to(tmp_path / "models--a--c")
    with pytest.raises(ValueError, match="got a link"):
        check_links(snapshot)

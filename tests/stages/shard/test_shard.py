import dataclasses
import io
import json
import math
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipprep.stages.shard.codec import check_codec, decode_mouth, encode_mouth, npy_array, npy_bytes
from lipprep.stages.shard.index import Index, Shard, load_index, save_index
from lipprep.stages.shard.reader import TarMembers, decode_sample, read_samples
from lipprep.stages.shard.writer import TarWriter


def smooth(T: int, S: int, seed: int = 0) -> np.ndarray:
    """Crops that look like pictures, not like noise."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, S)
    waves = [
        np.sin(2 * np.pi * (rng.uniform(1, 3) * x[:, None] + rng.uniform(1, 3) * x + rng.uniform())) for _ in range(T)
    ]
    return (127 + 100 * np.array(waves)).astype(np.uint8)


@given(T=st.integers(1, 40), S=st.sampled_from([8, 64, 88, 96]), codec=st.sampled_from(["jpeg", "npy"]))
@settings(max_examples=30, deadline=None)
def test_crops_come_back(T, S, codec):
    mouth = smooth(T, S)
    extension, payload = encode_mouth(mouth, codec=codec)
    back = decode_mouth(extension, payload)
    assert back.shape == mouth.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - mouth).mean() < (2.0 if codec == "jpeg" else 1e-9)


def test_frames_of_a_strip_do_not_bleed_into_each_other():
    mouth = np.zeros((6, 96, 96), np.uint8)
    mouth[::2] = 255
    back = decode_mouth(*encode_mouth(mouth, codec="jpeg"))
    assert np.abs(back.astype(int) - mouth).max() <= 1


def test_what_a_strip_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        check_codec("jpeg", 100)
    with pytest.raises(ValueError, match="682 at most"):
        encode_mouth(np.zeros((683, 96, 96), np.uint8))
    assert len(decode_mouth(*encode_mouth(np.zeros((682, 96, 96), np.uint8)))) == 682
    with pytest.raises(ValueError, match="too many for one clip"):
        encode_mouth(np.broadcast_to(np.uint8(0), (1 << 16, 65, 65)), codec="npy")
    with pytest.raises(ValueError, match="unknown codec"):
        check_codec("png", 96)


@pytest.mark.parametrize("payload", [b"", b"no picture", npy_bytes(np.zeros((3, 4), np.uint8))])
def test_damaged_members_are_refused(payload):
    for extension in ("mouth.jpg", "mouth.npy"):
        with pytest.raises(ValueError):
            decode_mouth(extension, payload)


def npy_of(text: str) -> bytes:
    """An .npy file whose header is `text`, without data."""
    header = text.encode(errors="replace").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def header_of(shape: str) -> bytes:
    return npy_of(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")


@pytest.mark.parametrize(
    "shape",
    ["(1000000000000, 96, 96)", "(-1, -1, 0)", "(99999999999999999999,)", "(2, 2, 2)", "(True, 4)", "(((", "'''"],
)
def test_headers_that_promise_what_is_not_there_are_refused(shape):
    with pytest.raises(ValueError, match="header of the array"):
        npy_array(header_of(shape) + bytes(4))
    with pytest.raises(ValueError):
        npy_array(b"\x93NUMPY\x03\x00" + header_of("(4,)")[8:])
    assert npy_array(header_of("(4,)") + bytes(4)).tolist() == [0] * 4


PIECES = [
    "'descr'",
    "'shape'",
    "'fortran_order'",
    "'|u1'",
    "'|O'",
    "'M8[D]'",
    "True",
    "False",
    "0",
    "2",
    "9" * 20,
    "-1",
]


@given(
    shape=st.lists(st.sampled_from(["True", "0", "1", "2", "4", "-1", "1.0", "None", "9" * 20]), max_size=4)
    | st.text(max_size=6),
    pieces=st.lists(st.sampled_from([*PIECES, *"(){}[]:,'\"\\\n \0#jL"]), max_size=12),
    data=st.binary(max_size=9),
)
@settings(max_examples=150, deadline=None)
def test_any_header_is_an_array_or_says_why_not(shape, pieces, data):
    for payload in (header_of(f"({', '.join(shape)}, )"), npy_of("".join(pieces)), npy_of(repr(pieces))):
        try:
            array = npy_array(payload + data)
        except ValueError as error:
            assert str(error)
        else:
            assert array.nbytes == len(data)


def test_a_picture_of_absurd_size_is_refused():
    payload = bytearray(encode_mouth(np.zeros((2, 96, 96), np.uint8))[1])
    frame = payload.index(b"\xff\xc0")  # the JPEG's frame header holds height and width
    payload[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(ValueError):
        decode_mouth("mouth.jpg", bytes(payload))


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{", "[" * 100_000])
def test_json_that_is_no_object_is_refused(text):
    extension, payload = encode_mouth(smooth(2, 8))
    with pytest.raises(ValueError, match="clip a/b"):
        decode_sample({"__key__": "a/b", extension: payload, "json": text.encode()})


def test_fields_do_not_take_the_place_of_key_and_mouth():
    extension, payload = encode_mouth(smooth(2, 8), codec="npy")
    fields = json.dumps({"key": "x", "mouth": "y", "label": 3}).encode()
    sample = decode_sample({"__key__": "a/b", extension: payload, "json": fields})
    assert sample["key"] == "a/b" and sample["label"] == 3
    assert np.array_equal(sample["mouth"], smooth(2, 8))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_of_every_version_are_read(version):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.arange(4), version)
    assert npy_array(buffer.getvalue()).tolist() == [0, 1, 2, 3]


def test_arrays_of_objects_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        npy_array(buffer.getvalue())


def write(path, samples) -> np.ndarray:
    """A shard of {key: (mouth, fields)}; its offsets."""
    offsets = []
    with TarWriter(path) as tar:
        for key, (mouth, fields) in samples.items():
            offsets.append(tar.offset)
            extension, payload = encode_mouth(mouth)
            tar.add(f"{key}.{extension}", payload)
            tar.add(f"{key}.json", json.dumps(fields).encode())
        offsets.append(tar.offset)
        tar.close()
        tar.publish()
    return np.array(offsets)


SAMPLES = {f"WORD/train/{'X' * (40 * n)}_{n}": (smooth(5 + n, 96, n), {"label": n}) for n in range(9)}


def test_tars_are_the_same_to_the_byte_and_plain_tars(tmp_path):
    write(tmp_path / "a.tar", SAMPLES)
    write(tmp_path / "b.tar", SAMPLES)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == [f"{next(iter(SAMPLES))}.mouth.jpg", f"{next(iter(SAMPLES))}.json"]
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_webdataset_itself_reads_the_shards(tmp_path):
    import webdataset

    write(tmp_path / "a.tar", SAMPLES)
    found = list(webdataset.WebDataset([str(tmp_path / "a.tar")], shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in found] == list(SAMPLES)


def test_samples_are_read_at_their_offsets(tmp_path):
    offsets = write(tmp_path / "a.tar", SAMPLES)
    for positions in (range(0, 9), range(3, 4), range(4, 9)):
        samples = read_samples(tmp_path / "a.tar", offsets, positions)
        assert [s["key"] for s in samples] == list(SAMPLES)[positions.start : positions.stop]
        assert [s["label"] for s in samples] == list(positions)
        assert [len(s["mouth"]) for s in samples] == [5 + n for n in positions]


def test_a_cut_shard_is_named(tmp_path):
    offsets = write(tmp_path / "a.tar", SAMPLES)
    data = (tmp_path / "a.tar").read_bytes()
    for length in (int(offsets[5]), int(offsets[5]) + 700, int(offsets[6]) - 512):
        (tmp_path / "a.tar").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.tar"):
            read_samples(tmp_path / "a.tar", offsets, range(4, 9))


def test_an_unfinished_tar_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), TarWriter(tmp_path / "a.tar") as tar:
        tar.add("x", b"y")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_members_by_name(tmp_path):
    write(tmp_path / "a.tar", SAMPLES)
    with TarMembers(tmp_path / "a.tar") as members:
        name = f"{list(SAMPLES)[4]}.json"
        assert json.loads(members.read(name)) == {"label": 4}
        assert name in members and "absent" not in members
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="no readable tar"):
        TarMembers(tmp_path / "a.tar")


@pytest.fixture
def indexed(tmp_path):
    offsets = write(tmp_path / "train-00000.tar", SAMPLES)
    size = (tmp_path / "train-00000.tar").stat().st_size
    index = Index(
        dataset="d",
        fingerprint="f",
        labels=("a", "b"),
        fps=25.0,
        parameters={"profile": "lrw2021", "crop_size": 96},
        failures={"train": {"no_face": 1}},
        shards=(Shard("train-00000.tar", "train", len(SAMPLES), size, "0" * 64),),
        offsets={"train-00000.tar": offsets},
    )
    save_index(tmp_path, index)
    return tmp_path, index


def test_the_index_comes_back(indexed):
    folder, index = indexed
    back = load_index(folder)
    assert back.shards == index.shards and back.labels == index.labels and back.profile == "lrw2021"
    assert np.array_equal(back.offsets["train-00000.tar"], index.offsets["train-00000.tar"])
    assert back.split("train") == index.shards
    with pytest.raises(ValueError, match="no clips of split 'val'"):
        back.split("val")


def test_what_does_not_fit_the_index_is_named(indexed):
    folder, _ = indexed
    text, tar = (folder / "index.json").read_text(), (folder / "train-00000.tar").read_bytes()
    for wrong in ("{}", "[]", "no json", text.replace('"lipprep_index": 3', '"lipprep_index": 99')):
        (folder / "index.json").write_text(wrong)
        with pytest.raises(ValueError, match="lipprep shards"):
            load_index(folder)
    (folder / "index.json").write_text(text)
    (folder / "train-00000.tar").write_bytes(tar[:-512])
    with pytest.raises(ValueError, match="cut short"):
        load_index(folder)
    (folder / "train-00000.tar").unlink()
    with pytest.raises(ValueError, match="missing"):
        load_index(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="lipprep shards -o"):
        load_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {}}, "profile"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {"profile": "lrw2021"}}, "crop_size"),
        ({"parameters": {"profile": "lrw2021", "crop_size": True}}, "crop_size"),
        ({"parameters": {"profile": "lrw2021", "crop_size": 96, "mean_face": [1, 2]}}, "mean_face"),
        ({"parameters": {"profile": "lrw2021", "crop_size": 96, "box": "80,116"}}, "box"),
        ({"parameters": {"profile": "lrw2021", "crop_size": 96, "exact": "no"}}, "exact"),
        ({"labels": "ab"}, "labels"),
        ({"labels": [1, 2]}, "labels"),
        *(
            ({"shards": [{"name": "x", "split": split, "samples": n, "bytes": size, "sha256": ""}]}, message)
            for split, n, size, message in (
                ("train", 2, 4095, "2 samples"),
                ("train", 10**7 + 1, 10**12, "10000001 samples"),
                ("\x1b", 1, 2048, "wrong form"),
            )
        ),
        ({"fps": 0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"fps": math.inf}, "fps"),
        ({"fps": "25"}, "fps"),
        ({"failures": {"train": 3}}, "index"),
        ({"shards": [{"name": "x.tar", "split": "train", "samples": "9", "bytes": 1, "sha256": ""}]}, "x.tar"),
        *(
            ({"shards": [{"name": name, "split": "train", "samples": 9, "bytes": 1, "sha256": ""}]}, "file name")
            for name in ("../x.tar", "/etc/passwd", "a/b.tar", "a\\\\b.tar", "..", "", 7)
        ),
    ],
)
def test_a_damaged_index_is_named_with_its_remedy(change, message, indexed, change_index):
    folder, _ = indexed
    change_index(folder, **change)
    with pytest.raises(ValueError, match=rf"index\.json.*{message}.*lipprep shards -o"):
        load_index(folder)


def test_mean_faces_are_absent_digests_or_points(indexed):
    folder, index = indexed
    for face in (None, "0" * 64, [[1.5, 2]] * 68):
        save_index(folder, dataclasses.replace(index, parameters=index.parameters | {"mean_face": face}))
        assert load_index(folder).parameters["mean_face"] == face


@pytest.mark.parametrize("size", [0, 10, 300])
def test_offsets_cut_short_are_named(size, indexed):
    folder, _ = indexed
    (folder / "index.npz").write_bytes((folder / "index.npz").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"index\.npz.*lipprep shards -o"):
        load_index(folder)


@pytest.mark.parametrize("wrong", ["short", "float", "negative", "equal", "falling", "beyond"])
def test_offsets_outside_their_shard_are_named(wrong, indexed, change_index):
    folder, index = indexed
    (name,) = index.offsets
    starts = index.offsets[name].astype(np.int64)
    changed = {
        "short": starts[:-1],
        "float": starts.astype(np.float64),
        "negative": starts - 512,
        "equal": np.where(np.arange(len(starts)) == 3, starts[2], starts),
        "falling": starts[::-1],
        "beyond": np.where(np.arange(len(starts)) == len(starts) - 1, 10**9, starts),
    }
    np.savez(folder / "index.npz", **{name: changed[wrong]})
    change_index(folder)
    with pytest.raises(ValueError, match=r"train-00000\.tar in .*index\.npz.*lipprep shards -o"):
        load_index(folder)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**30)
    | st.floats()
    | st.sampled_from(["", "x", "../x", "\ud800", "train"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_index_loads_or_says_why_not(data, indexed, change_index):
    folder, index = indexed
    save_index(folder, index)
    plain = json.loads((folder / "index.json").read_text())
    fields = {}
    for name in data.draw(st.lists(st.sampled_from([*plain, "colour"]), min_size=1, max_size=2)):
        value = plain.get(name)
        if isinstance(value, dict) and data.draw(st.booleans()):
            fields[name] = value | {data.draw(st.sampled_from([*value, "box", "exact"])): data.draw(ANY)}
        elif name == "shards" and data.draw(st.booleans()):
            fields[name] = [value[0] | {data.draw(st.sampled_from([*value[0]])): data.draw(ANY)}]
        else:
            fields[name] = data.draw(ANY)
    change_index(folder, **fields)
    if data.draw(st.booleans()):
        content = bytearray((folder / "index.json").read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
        (folder / "index.json").write_bytes(content)
    try:
        load_index(folder)
    except ValueError as error:
        assert "lipprep shards -o" in str(error)

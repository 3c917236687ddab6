import os
import pickle

import numpy as np
import pytest

from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks.archive import archive_file, read_archive, read_persons

POINTS = np.random.default_rng(0).uniform(0, 256, (3, 68, 2)).astype(np.float32)
CLIPS = ["ABOUT/test/ABOUT_00001", "ABOUT/test/ABOUT_00002", "ABSOLUTELY/test/ABSOLUTELY_00001"]


def write(folder, entries, *, kind="pkl", name="WORD/test/WORD_00001"):
    path = folder / f"{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pkl":
        path.write_bytes(pickle.dumps(entries))
    else:
        np.savez_compressed(path, data=entries)
    return folder, name


def objects(*rows):
    data = np.empty(len(rows), object)
    data[:] = rows
    return data


def person(points):
    return {"id": 0, "facial_landmarks": points, "roll": 0.5}


def kind_and_message(folder, name="WORD/test/WORD_00001"):
    with pytest.raises(ClipFailure) as failure:
        read_archive(folder, name)
    return failure.value.kind, str(failure.value)


@pytest.mark.parametrize("name", [*CLIPS, "ABSOLUTELY/test/ABSOLUTELY_00002"])
def test_both_published_formats_hold_the_same(golden, name):
    folder = golden / "crops"
    index = read_persons(folder / "detected_face.csv")[name]
    npz = read_archive(folder / "landmarks_npz", name, person=index)
    pkl = read_archive(folder / "landmarks_pkl", name, person=index)
    assert npz.points.shape == (29, 68, 2) and npz.points.dtype == np.float32
    np.testing.assert_array_equal(npz.points, pkl.points)
    missing = np.isnan(npz.points).all(axis=(1, 2))
    assert missing.any() == (name == "ABOUT/test/ABOUT_00002")
    assert -20 < np.nanmin(npz.points) < np.nanmax(npz.points) < 276  # one face leaves its frame


def test_persons_are_chosen_and_counted(golden):
    folder, name = golden / "crops" / "landmarks_npz", "ABSOLUTELY/test/ABSOLUTELY_00002"
    first, second = (read_archive(folder, name, person=p) for p in (0, 1))
    assert first.max_faces == second.max_faces == 2
    assert np.nanmean(np.abs(first.points - second.points)) > 10
    assert np.isnan(read_archive(folder, name, person=7).points).all()


@pytest.mark.parametrize(
    "entries",
    [
        objects([person(POINTS[0])], [person(POINTS[1])], [person(POINTS[2])]),
        objects([person(POINTS[0])], [person(POINTS[1])], [person(POINTS[2])])[:, None],
        objects(*(np.array([person(p)], object) for p in POINTS)),
        POINTS,
        POINTS.astype(np.float64),
        POINTS.reshape(3, 136),
        POINTS[:, None],
    ],
    ids=["lists", "column of lists", "arrays", "float32", "float64", "136 numbers", "one person"],
)
def test_npz_forms(tmp_path, entries):
    if entries.dtype == np.dtype(object) and entries.ndim == 2:
        entries = np.array([[row[0][0]] for row in entries], object)  # (T, 1) of dicts
    clip = read_archive(*write(tmp_path, entries, kind="npz"))
    np.testing.assert_array_equal(clip.points, POINTS)
    assert clip.max_faces == 1


def test_pkl_forms(tmp_path):
    whole = POINTS.astype(np.int32)
    clip = read_archive(*write(tmp_path, [whole[0], None, whole[2]]), person=3)
    np.testing.assert_array_equal(clip.points[[0, 2]], whole[[0, 2]])
    assert np.isnan(clip.points[1]).all() and clip.max_faces == 1
    assert np.isnan(read_archive(*write(tmp_path, [None, None])).points).all()
    broken = POINTS[0].copy()
    broken[5, 1] = np.nan
    assert np.isnan(read_archive(*write(tmp_path, [broken])).points).all()


def test_missing_file_says_where_it_looked(tmp_path):
    kind, message = kind_and_message(tmp_path)
    assert kind == "landmarks_missing"
    assert str(tmp_path / "WORD/test/WORD_00001.npz") in message and ".pkl" in message
    assert archive_file(tmp_path, "WORD/test/WORD_00001") is None


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("kind", ["pkl", "npz"])
def test_other_numbers_of_points_are_explained(tmp_path, count, kind):
    points = np.zeros((count, 2), np.float32)
    folder, _ = write(tmp_path, [points] if kind == "pkl" else objects([person(points)]), kind=kind)
    failure, message = kind_and_message(folder)
    assert failure == "bad_landmarks"
    assert f"{count} points" in message and "68 iBUG points" in message


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["pkl", "npz"])
def test_a_malicious_pickle_is_refused_by_name(tmp_path, kind):
    entries = [Hostile(tmp_path / "ran")]
    folder, _ = write(tmp_path, entries if kind == "pkl" else objects(*entries), kind=kind)
    failure, message = kind_and_message(folder)
    assert failure == "bad_landmarks" and "system" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "content"),
    [("pkl", b""), ("pkl", b"not a pickle"), ("npz", b"PK\x03\x04 cut"), ("npz", b"")],
)
def test_other_files_are_bad_landmarks(tmp_path, kind, content):
    folder, name = write(tmp_path, [POINTS[0]] if kind == "pkl" else POINTS, kind=kind)
    (folder / f"{name}.{kind}").write_bytes(content)
    assert kind_and_message(folder)[0] == "bad_landmarks"


def test_wrong_contents_are_bad_landmarks(tmp_path):
    for entries in ({"a": 1}, 3, ["text"], [{"landmarks": POINTS[0]}], [[["a"]]], [POINTS[0].astype(str)]):
        try:
            folder, _ = write(tmp_path, entries)
            assert kind_and_message(folder)[0] == "bad_landmarks"
        finally:
            (tmp_path / "WORD/test/WORD_00001.pkl").unlink()
    for arrays in ({"landmarks": POINTS}, {"data": np.array(["a"])}, {"data": np.zeros(3, [("x", "f4")])}):
        path = tmp_path / "WORD/test/WORD_00001.npz"
        np.savez(path, **arrays)
        assert kind_and_message(tmp_path)[0] == "bad_landmarks"


def doubled(depth):
    nested = [1.0, 2.0]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        (np.zeros((10**8, 0), np.float32), "npz"),
        (np.zeros((1, 10**12, 0, 2), np.float32), "npz"),
        (np.zeros((10**8, 0), np.float32), "pkl"),
        ([None] * 200_000, "pkl"),
        ([[None] * 10**6] * 90_000, "pkl"),
        ([[{"facial_landmarks": doubled(60)}]], "pkl"),
        ([[{"facial_landmarks": [np.zeros(10**5, np.float32)] * 10**5}]], "pkl"),
    ],
)
def test_small_files_cannot_claim_much(tmp_path, entries, kind):
    failure, message = kind_and_message(write(tmp_path, entries, kind=kind)[0])
    assert failure == "bad_landmarks" and len(message) < 1000


def test_points_may_be_lists(tmp_path):
    for points in (POINTS[0].tolist(), POINTS[0].ravel().tolist(), list(POINTS[0])):
        clip = read_archive(*write(tmp_path, [[{"facial_landmarks": points}]]))
        np.testing.assert_array_equal(clip.points, POINTS[:1])


def test_a_damaged_npz_is_bad_landmarks(tmp_path):
    folder, name = write(tmp_path, objects([person(POINTS[0])]), kind="npz")
    path = folder / f"{name}.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert kind_and_message(folder)[0] == "bad_landmarks"


def test_person_lists(tmp_path):
    path = tmp_path / "persons.csv"
    path.write_text("ABOUT/test/ABOUT_00001,0\nABOUT/test/ABOUT_00002.mp4,2\n\n")
    assert read_persons(path) == {"ABOUT/test/ABOUT_00001": 0, "ABOUT/test/ABOUT_00002": 2}
    path.write_text("filename,person\r\nABOUT\\test\\ABOUT_00001, 1\r\n")
    assert read_persons(path) == {"ABOUT/test/ABOUT_00001": 1}
    for text in ("ABOUT/test/ABOUT_00001\n", "ABOUT/test/ABOUT_00001,x\n", "name,id\nA/test/A_1,-1\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="line"):
            read_persons(path)

"""ZIP archives from anywhere: hostile ones are refused whole, nothing is ever written."""

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from captioning_examples import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning import Character, Store, UnpackLimits, UserError, load_skipped, take_in

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")  # they are what is tested

GOOD = png("red")


def archive(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    pairs = members.items() if isinstance(members, dict) else members
    with zipfile.ZipFile(path, "w", **options) as made:
        for name, data in pairs:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name  # ZipInfo would make odd names plain
            info.compress_type = made.compression
            made.writestr(info, data)
    return path


@pytest.fixture
def take(tmp_path: Path, store: Store, aya: Character):
    """Takes an archive in, and checks that all that was written lies in the store."""

    def taken(path: Path, **options):
        before = contents(tmp_path)
        try:
            return take_in(path, store, aya, **options)
        finally:
            after = {
                name: data
                for name, data in contents(tmp_path).items()
                if not name.startswith("home/")
            }
            assert after == {n: d for n, d in before.items() if not n.startswith("home/")}

    return taken


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_pictures_of_nested_folders_are_taken_in_natural_order(tmp_path: Path, take, store: Store):
    path = archive(
        tmp_path / "aya.zip",
        {
            "b/10.png": png("green"),
            "b/": b"",
            "b/2.png": png("blue"),
            "a.PNG": GOOD,
            "__MACOSX/._a.PNG": b"resource fork",
            "b/.DS_Store": b"finder",
            "inner.zip": b"PK",
            "phone.heic": b"ftyp",
        },
    )
    report = take(path)
    assert [image.source for image in report.images] == ["a.PNG", "b/2.png", "b/10.png"]
    assert {one.source: one.reason for one in report.skipped} == {
        "inner.zip": "an archive inside a folder or archive is not read; give it by itself",
        "phone.heic": ".heic is not read; save it as PNG or JPEG",
    }
    assert store.blobs.get(report.images[0].sha256) == GOOD


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil.png", "leads out"),
        ("a/../../evil.png", "leads out"),
        ("..\\evil.png", "leads out"),
        ("a/..", "leads out"),
        ("/etc/evil.png", "absolute"),
        ("\\evil.png", "absolute"),
        ("C:\\evil.png", "absolute"),
        ("c:evil.png", "absolute"),
        ("a//b.png", "no plain path"),
        ("./a.png", "no plain path"),
        ("a.png\0.txt", "NUL"),
    ],
)
def test_zip_with_a_name_that_leads_out_is_refused_whole(
    tmp_path: Path, take, store: Store, name: str, said: str
):
    path = archive(tmp_path / "evil.zip", {"good.png": GOOD, name: png("blue")})
    with pytest.raises(UserError, match=said):
        take(path)
    assert not store.root.exists()


@pytest.mark.parametrize("second", ["a.png", "A.PNG", "a.png/b.png"])
def test_zip_with_a_name_twice_is_refused(tmp_path: Path, take, store: Store, second: str):
    path = archive(tmp_path / "twice.zip", [("a.png", GOOD), (second, png("blue"))])
    with pytest.raises(UserError, match=r"is there twice|which is a file"):
        take(path)
    assert not store.root.exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_zip_with_a_link_or_a_device_is_refused(tmp_path: Path, take, store: Store, kind: int):
    path = tmp_path / "link.zip"
    with zipfile.ZipFile(path, "w") as made:
        info = zipfile.ZipInfo("link.png")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        made.writestr(info, "/etc/passwd")
        made.writestr("good.png", GOOD)
    with pytest.raises(UserError, match=r"is a link|is no file"):
        take(path)
    assert not store.root.exists()


def test_zip_beyond_a_limit_is_refused(tmp_path: Path, take, store: Store):
    many = archive(tmp_path / "many.zip", {f"{n}.png": GOOD for n in range(5)})
    blank = archive(
        tmp_path / "blank.zip", {"blank.bmp": bytes(2**21)}, compression=zipfile.ZIP_DEFLATED
    )
    for path, limits, said in [
        (many, UnpackLimits(members=4), "5 members, more than 4"),
        (many, UnpackLimits(member_bytes=len(GOOD) - 1), "'0.png' has more than"),
        (many, UnpackLimits(total_bytes=5 * len(GOOD) - 1), "once unpacked"),
        (many, UnpackLimits(directory_bytes=100), "a list of members"),
        (blank, UnpackLimits(), "times its packed size"),
    ]:
        with pytest.raises(UserError, match=said):
            take(path, limits=limits)
    assert not store.root.exists()
    just = UnpackLimits(members=5, member_bytes=len(GOOD), total_bytes=5 * len(GOOD))
    assert take(many, limits=just).duplicates == 4


def test_a_member_that_says_it_is_small_and_is_not_is_skipped(tmp_path: Path, take):
    path = archive(
        tmp_path / "liar.zip", {"big.png": bytes(10**6), "good.png": GOOD}, compression=8
    )
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2")  # big.png in the list of members
    struct.pack_into("<L", data, place + 24, 1000)
    path.write_bytes(data)
    report = take(path)
    assert len(report.images) == 1
    assert "damaged inside the archive" in report.skipped[0].reason


def test_a_damaged_member_is_skipped_and_named(tmp_path: Path, take, store: Store):
    path = archive(tmp_path / "spoiled.zip", {"1.png": GOOD, "2.png": png("blue")})
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(data)
    report = take(path)
    assert [image.source for image in report.images] == ["2.png"]
    assert "damaged inside the archive" in load_skipped(store, "aya")[0].reason


def test_an_encrypted_archive_is_refused(tmp_path: Path, take):
    path = archive(tmp_path / "secret.zip", {"1.png": GOOD})
    data = bytearray(path.read_bytes())
    for place in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[place] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        take(path)


@pytest.mark.parametrize(
    "data", [b"", b"no archive", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, take, data: bytes):
    path = tmp_path / "odd.zip"
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"not a readable ZIP file|no pictures in it|list of members"
    ):
        take(path)


NAMES = st.one_of(
    st.lists(
        st.sampled_from(["..", ".", "", "a", "A", "/", "\\", "C:", "é", "e\u0301"]), max_size=5
    )
    .map("/".join)
    .map(lambda name: name + ".png"),
    st.text(max_size=20).map(lambda name: name + ".png"),
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=4))
def test_hostile_names_never_write_outside_the_store(
    tmp_path: Path, take, store: Store, names: list[str]
):
    try:
        path = archive(tmp_path / "any.zip", [(name, GOOD) for name in names])
    except (UnicodeEncodeError, ValueError):
        return  # no ZIP file can hold such a name
    try:
        report = take(path)
    except UserError:
        return
    assert all(".." not in image.source.split("/") for image in report.images)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10_000),
)
def test_spoiled_archives_are_refused_or_read_in_part(
    tmp_path: Path, take, edits: list[tuple[int, int]], cut: int
):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=8) as made:
        made.writestr("1.png", GOOD)
        made.writestr("1.txt", "red hair")
    data = bytearray(buffer.getvalue())
    for place, value in edits:
        data[place % len(data)] = value
    path = tmp_path / "any.zip"
    path.write_bytes(data if cut % 3 else data[: cut % len(data)])
    try:
        take(path)
    except UserError as error:
        assert str(path) in str(error)

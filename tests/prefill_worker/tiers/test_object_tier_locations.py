"""Which places can be named, and what is said of those that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.store import GCSStore, LocalStore, S3Store

from prefill_worker.tiers.locations import FolderLock, folder_of, open_location
from prefill_worker.tiers.object_files import ObjectError, ObjectFiles
from tests.support.object_parts import QUICK
from tests.support.s3_server import open_bucket


def test_a_path_and_a_file_url_name_a_folder(tmp_path: Path) -> None:
    for place in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        store = open_location(place)
        assert isinstance(store, LocalStore)
        assert folder_of(store) == tmp_path / "a b"
    assert (tmp_path / "a b").stat().st_mode & 0o777 == 0o700


def test_urls_name_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from the environment")
    s3 = open_location("s3://bucket/some/prefix", {"region": "eu-west-1", "allow_http": "true"})
    assert isinstance(s3, S3Store)
    assert (s3.prefix, s3.config["bucket"], folder_of(s3)) == ("some/prefix", "bucket", None)
    assert isinstance(open_location("gs://bucket/prefix"), GCSStore)
    assert "azure" in type(open_location("az://container/prefix", {"account_name": "account"})).__name__.lower()


@pytest.mark.parametrize(
    ("place", "options", "says"),
    [
        ("", {}, "name a folder"),
        ("/", {}, "name a folder"),
        ("file://host/folder", {}, "three slashes"),
        ("ftp://host/folder", {}, "ftp:// is none of"),
        ("memory:///", {}, "memory:// is none of"),
        ("s3://", {}, "this URL"),
        ("s3://bucket", {"regoin": "eu"}, "regoin"),
        ("az://container/prefix", {}, "Account"),
        ("/tmp/folder", {"region": "eu"}, "takes no options; given: region"),  # noqa: S108 - it is not made
    ],
)
def test_what_cannot_be_used_is_said_with_the_setting(place: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=r"^object_store: ") as raised:
        open_location(place, options, setting="object_store")
    assert says in str(raised.value)


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"disk_path: .*file/folder cannot be used"):
        open_location(str(tmp_path / "file" / "folder"), setting="disk_path")


def test_no_secret_is_in_a_message_or_a_repr() -> None:
    secrets = {"access_key_id": "AKIA-hush", "secret_access_key": "hush-hush"}
    with pytest.raises(ValueError, match="object_store") as raised:
        open_location("s3://bucket", {**secrets, "conditional_put": "hush-hush"}, setting="object_store")
    assert "hush" not in f"{raised.value!r}"
    assert raised.value.__suppress_context__
    with pytest.raises(ValueError, match="object_store") as raised:
        open_location("s3://user:hush@/x y", secrets, setting="object_store")
    assert "hush" not in f"{raised.value!r}"
    assert "hush" not in repr(open_location("s3://bucket", secrets))


async def test_a_dead_port_is_an_error_in_time() -> None:
    files = ObjectFiles(open_bucket(9, "nowhere"), QUICK)
    for attempt in (files.get("a"), files.size("a"), files.delete("a"), files.put("a", [b"b"])):
        with pytest.raises(ObjectError) as raised:
            await attempt
        assert not raised.value.full
        assert "?" not in str(raised.value)
    with pytest.raises(ObjectError):
        _ = [items async for items in files.list("a")]


def test_a_lock_ends_with_its_holder_and_freeing_twice_is_harmless(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "disk_path"), FolderLock(tmp_path, "disk_path")
    first.take()
    with pytest.raises(OSError, match="in use by another worker"):
        second.take()
    first.free()
    first.free()
    second.take()
    second.free()
    with pytest.raises(OSError, match=r"disk_path: .* cannot be used: No such file"):
        FolderLock(tmp_path / "none", "disk_path").take()

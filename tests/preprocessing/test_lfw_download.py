"""lfw_download.py with scikit-learn's folder filled, against a server here, and against nothing."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest
from sklearn.datasets import _base, _lfw

from config import Config
from pre_process import main
from preprocessing.lfw_download import download_lfw
from preprocessing.sources import find_jobs
from tests.helpers.synthetic_faces import face
from utils import UserError

PAIRS = b"10\t300\n"


def lfw_archive():
    """LFW in small: two people, and a list as the real archive has."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in {
            "lfw_funneled/Ann_A/Ann_A_0001.jpg": face(0),
            "lfw_funneled/Bob_B/Bob_B_0001.jpg": face(1),
            "lfw_funneled/pairs_01.txt": PAIRS,
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def files():
    return {"/lfw-funneled.tgz": lfw_archive(), "/pairs.txt": PAIRS}


@pytest.fixture
def server(files, monkeypatch, tmp_path):
    """A host that has the files, under scikit-learn's names and with their true sums."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path])

        def log_message(self, *_):
            pass

    asked = []
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    remotes = [
        _base.RemoteFileMetadata(
            path[1:],
            f"http://127.0.0.1:{host.server_address[1]}{path}",
            hashlib.sha256(data).hexdigest(),
        )
        for path, data in files.items()
    ]
    monkeypatch.setattr(_lfw, "FUNNELED_ARCHIVE", remotes[0])
    monkeypatch.setattr(_lfw, "TARGETS", (remotes[1],))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setattr(_base.time, "sleep", lambda _: None)
    yield asked
    host.shutdown()
    host.server_close()


def test_from_a_server_to_records(server, tmp_path, capsys):
    data = tmp_path / "data"
    cfg = Config(data_dir=str(data), images_dir=str(tmp_path / "images"), download_lfw=True)
    main(cfg)
    assert sorted(server) == ["/lfw-funneled.tgz", "/pairs.txt"]
    assert (data / "pairs.txt").read_bytes() == PAIRS
    assert (data / "lfw_home" / "lfw-funneled.tgz").is_file()
    assert "kept 2 of 2 identities" in capsys.readouterr().out
    main(cfg)  # all is there now
    assert len(server) == 2
    assert "is finished" in capsys.readouterr().out


def test_wrong_bytes_are_refused(server, files, tmp_path):
    files["/pairs.txt"] += b"tampered"
    with pytest.raises(UserError, match=r"pairs\.txt could not be fetched .*SHA256"):
        download_lfw(tmp_path)
    assert not (tmp_path / "pairs.txt").exists()
    assert not list(tmp_path.rglob("*.part_*"))


def test_no_network_is_a_sentence(server, tmp_path, monkeypatch):
    remote = _lfw.TARGETS[0]._replace(url="http://127.0.0.1:9/pairs.txt")
    monkeypatch.setattr(_lfw, "TARGETS", (remote,))
    with pytest.raises(UserError, match="could not be fetched"):
        download_lfw(tmp_path)


@pytest.mark.parametrize("where", ["data", "sklearn"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_scikit_learn_fetched_before_is_used(where, packed, server, tmp_path):
    """`data` stands for data_home="data"; sklearn unpacks the archive and deletes it."""
    home = tmp_path / where / "lfw_home"
    home.mkdir(parents=True)
    (home / "pairs.txt").write_bytes(PAIRS)
    if packed:
        (home / "lfw-funneled.tgz").write_bytes(lfw_archive())
    else:
        with tarfile.open(fileobj=io.BytesIO(lfw_archive())) as archive:
            archive.extractall(home, filter="data")
    found = download_lfw(tmp_path / "data")
    assert not server
    assert found.parent == home
    assert (tmp_path / "data" / "pairs.txt").read_bytes() == PAIRS
    (job,) = find_jobs(Config(data_dir=str(tmp_path / "data")), found)
    assert job.source == found
    assert job.crop_missed


def test_pairs_that_are_there_stay(server, tmp_path):
    (tmp_path / "pairs.txt").write_text("mine")
    download_lfw(tmp_path)
    assert (tmp_path / "pairs.txt").read_text() == "mine"
    assert server == ["/lfw-funneled.tgz"]

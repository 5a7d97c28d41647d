"""The download of LFW: from a local server, from none, and with scikit-learn's folder filled."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from config import Config
from pre_process import main
from preprocessing import lfw_download
from preprocessing.lfw_download import LFW_FILES, RETRY_DELAYS, RemoteFile, download_lfw
from preprocessing.sources import find_jobs
from tests.helpers.synthetic_faces import face
from utils import UserError

PAIRS = b"10\t300\n"


def lfw_archive():
    """A small LFW: two identities, and a list as the real archive has."""
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
    """A host that has the files, whose addresses and checksums replace the real ones."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = files[self.path]
            if callable(data):
                data = data(self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    requests = []
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    for path, data in files.items():
        url = f"http://127.0.0.1:{host.server_address[1]}{path}"
        monkeypatch.setitem(LFW_FILES, path[1:], RemoteFile(url, hashlib.sha256(data).hexdigest()))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setattr(lfw_download.time, "sleep", lambda _: None)
    yield requests
    host.shutdown()
    host.server_close()


def test_addresses_and_checksums_are_those_of_scikit_learn():
    """Its public part is the download itself; these tables are private, hence a test alone."""
    _lfw = pytest.importorskip("sklearn.datasets._lfw")
    published = {remote.filename: remote for remote in (_lfw.FUNNELED_ARCHIVE, *_lfw.TARGETS)}
    for name, remote in LFW_FILES.items():
        assert remote == (published[name].url, published[name].checksum)


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
    with pytest.raises(UserError, match=r"pairs\.txt could not be downloaded .*SHA-256"):
        download_lfw(tmp_path)
    assert len(server) == len(RETRY_DELAYS) + 1
    assert not (tmp_path / "pairs.txt").exists()
    assert list((tmp_path / "lfw_home").iterdir()) == []


def test_a_host_that_fails_at_first_is_tried_again(server, files, tmp_path, capsys):
    good = files["/pairs.txt"]

    def failing(handler):
        """Refuse, then break off in the middle, then answer."""
        if len(server) == 1:
            handler.send_error(503)
            raise ConnectionAbortedError
        if len(server) == 2:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(good)))
            handler.end_headers()
            handler.wfile.write(good[:-2])
            raise ConnectionAbortedError
        return good

    files["/pairs.txt"] = failing
    download_lfw(tmp_path)
    assert (tmp_path / "pairs.txt").read_bytes() == good
    assert server == ["/pairs.txt"] * 3 + ["/lfw-funneled.tgz"]
    assert capsys.readouterr().out.count("trying again") == 2


def test_no_network_is_a_user_error(server, tmp_path, monkeypatch):
    remote = LFW_FILES["pairs.txt"]._replace(url="http://127.0.0.1:9/pairs.txt")
    monkeypatch.setitem(LFW_FILES, "pairs.txt", remote)
    with pytest.raises(UserError, match="could not be downloaded"):
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
    images = download_lfw(tmp_path / "data")
    assert not server
    assert images.parent == home
    assert (tmp_path / "data" / "pairs.txt").read_bytes() == PAIRS
    (job,) = find_jobs(tmp_path / "data", lfw=images)
    assert job.source == images
    assert job.crop_missed


def test_pairs_that_are_there_stay(server, tmp_path):
    (tmp_path / "pairs.txt").write_text("mine")
    download_lfw(tmp_path)
    assert (tmp_path / "pairs.txt").read_text() == "mine"
    assert server == ["/lfw-funneled.tgz"]

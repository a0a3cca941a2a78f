"""
The Hugging Face hub: names of checkpoints become files, from the same cache on disk as huggingface_hub's, over requests.

    "owner/name" --find--> (path of its config, path of its weights), downloaded if they are not in the cache

Nothing to run here; `from_pretrained` of FlexTok, VAE and GPT uses it for names that are no directory.
"""
import hashlib
import os
import re
import sys
import time
from contextlib import contextmanager

import requests

from common import UserError, replacing

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
RETRY_SECONDS = 1.0


def find(name, config_file, weights_file):
    """(path of the config, path of the weights) of a checkpoint: a directory, its weights file, or a hub name."""
    name = os.fspath(name)
    if os.path.isfile(name):
        return os.path.join(os.path.dirname(name), config_file), name
    if not os.path.isdir(name) and HUB_NAME.fullmatch(name):
        try:
            return hub_file(name, config_file), hub_file(name, weights_file)
        except UserError as error:
            raise UserError(f"{name}: not a file or directory here; {error}") from None
    config_path = os.path.join(name, config_file)
    if not os.path.isdir(name):
        raise UserError(f"{config_path}: there is no directory {name}, nor is that a name on the hub (owner/name)")
    return config_path, os.path.join(name, weights_file)


def cache_directory():
    """Where huggingface_hub keeps its files, by the same environment variables."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def hub_file(repository, file):
    """A file of a hub repository -> its path in the cache, downloaded if it is not there. Raises `UserError`.

    models--OWNER--NAME/ refs/main (the commit's name)   blobs/ETAG (the contents)   snapshots/COMMIT/FILE -> ../../blobs/ETAG
    """
    cache, folder = cache_directory(), "models--" + repository.replace("/", "--")
    reference = os.path.join(cache, folder, "refs", "main")
    commit = open(reference).read().strip() if os.path.isfile(reference) else ""
    path = os.path.join(cache, folder, "snapshots", commit or "none", file)
    if os.path.exists(path):
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{repository}: {file} is not in the cache {cache}, and HF_HUB_OFFLINE forbids downloading it")
    # the commit that is here already, if any: config and weights must belong together
    commit, etag, size, url = hub_header(repository, file, "main" if commit in ("", no_commit(repository)) else commit)
    blob = os.path.join(cache, folder, "blobs", etag)
    path = os.path.join(cache, folder, "snapshots", commit, file)
    try:
        with locked(os.path.join(cache, ".locks", folder, etag + ".lock")):
            if not os.path.isfile(blob):
                fetch(url, blob, etag, size, f"{repository}/{file}")
            if not os.path.exists(path):
                with replacing(path) as temporary:
                    os.symlink(os.path.relpath(blob, os.path.dirname(path)), temporary)
            if not os.path.isfile(reference):
                with replacing(reference) as temporary, open(temporary, "w") as out:
                    out.write(commit)
    except OSError as error:  # no space, no permission
        raise UserError(f"{cache}: {repository}/{file} cannot be stored there ({error.strerror or error})") from None
    return path


def hub_header(repository, file, revision):
    """Ask the hub for (commit, etag, size, address) of a file, without its contents. Raises `UserError`."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/{revision}/{file}"
    for _ in range(5):  # redirects
        answer = ask("HEAD", url, allow_redirects=False)  # the hub's own answer has the headers, not the storage behind it
        moved = answer.headers.get("Location", "")
        if answer.status_code not in (301, 302, 307, 308) or not moved.startswith("/"):
            break
        url = endpoint + moved  # the repository has another name now
    if answer.status_code in (401, 403):
        raise UserError(f"{repository}: the hub answered {answer.status_code}: it does not exist, or it is gated: accept its licence "
                        f"at {endpoint}/{repository} and put your access token into HF_TOKEN")
    if answer.status_code >= 400:
        raise UserError(f"{repository}: the hub answered {answer.status_code} for {file} at {url}")
    commit, etag = answer.headers.get("X-Repo-Commit", ""), answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag", "")
    etag, size = etag.removeprefix("W/").strip('"'), answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise UserError(f"{url}: the server does not say how long the file is")
    # These become names of files, so they have to look like the hub's own. A plain file server has none: we make some up.
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        url = f"{endpoint}/{repository}/resolve/{commit}/{file}"
    else:
        commit = no_commit(repository)
    if not re.fullmatch(r"[\w-]{1,128}", etag, re.ASCII):
        etag = "other-" + hashlib.sha1(f"{url} {etag} {size}".encode()).hexdigest()
    return commit, etag, int(size), url


def no_commit(repository):
    """Stands for the commit of a repository on a server that does not name it."""
    return hashlib.sha1(repository.encode()).hexdigest()


def ask(method, url, headers={}, **options):
    """requests.request, with the token if there is one and without compression; no connection raises `UserError`."""
    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {}), **headers}
    try:
        return requests.request(method, url, headers=headers, timeout=(10, 30), **options)
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"{url}: cannot be reached ({type(error).__name__}); if this machine is offline, copy the files here and "
                        f"name their directory") from None


@contextmanager
def locked(path):
    """Hold a lock file: of several processes that want the same file, one downloads it and the others wait."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        except ImportError:  # Windows
            pass
        yield


def fetch(url, path, etag, size, label):
    """Download `size` bytes to `path`, going on where an earlier attempt broke off; they must have the digest that is their etag."""
    part, failures, problem = path + ".incomplete", 0, ""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(part, "ab").close()
    if os.path.getsize(part) > size:
        os.truncate(part, 0)
    while (have := os.path.getsize(part)) < size:
        if failures == 5:
            raise UserError(f"{label}: the connection broke at {have:,} of {size:,} bytes ({problem}); run again to go on from there")
        problem = "closed too early"
        try:
            with ask("GET", url, {"Range": f"bytes={have}-"} if have else {}, stream=True) as answer:
                if answer.status_code == 200 and have:  # no ranges here
                    os.truncate(part, 0)
                resumes = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                if answer.status_code != 200 and not resumes:
                    problem = f"the server answered {answer.status_code}"
                else:
                    receive(answer, part, size, label)
        except requests.RequestException as error:
            problem = type(error).__name__
        except UserError:
            problem = "no connection"
        if os.path.getsize(part) <= have:
            failures += 1
            time.sleep(RETRY_SECONDS * failures)
    digest = file_digest(part, etag)
    if os.path.getsize(part) != size or digest not in (None, etag):
        os.remove(part)
        raise UserError(f"{label}: what arrived is not the file (its digest or length is wrong); nothing was kept, try again")
    os.replace(part, path)


def receive(answer, part, size, label):
    """Append the answer's bytes to `part`, with one line of progress; stops as soon as there are more than `size`."""
    with open(part, "ab") as file:
        shown_at = 0.0
        for chunk in answer.iter_content(2**16):  # if the connection breaks, the chunk under way is lost
            file.write(chunk)
            have = file.tell()
            if size > 2**22 and (time.time() > shown_at + 0.5 or have >= size):
                print(f"\r{label}: {have / 1e6:,.0f} of {size / 1e6:,.0f} MB", end="\n" if have >= size else "", file=sys.stderr, flush=True)
                shown_at = time.time()
            if have > size:
                return


def file_digest(path, etag):
    """The digest that an etag of this length is: sha256 for large files, git's sha1 for small ones; None if neither."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return None
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()



"""
The Hugging Face hub: names of checkpoints become files, from the same cache as huggingface_hub's, over requests.

    "owner/name" --find--> (path of its config, path of its weights), downloaded if they are not in the cache

Nothing to run here; `from_pretrained` of FlexTok, VideoFlexTok, VAE and GPT uses it for names that are no directory.
"""
import hashlib
import os
import re
import sys
import time

import requests

from common import UserError, locked, replacing, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
RETRY_SECONDS = 1.0


def is_hub_name(name):
    """Whether `name` is to be asked of the hub: owner/name, and no path here: nothing begins with a folder of ours."""
    name = os.fspath(name)
    owner = name.split("/")[0]
    return bool(HUB_NAME.fullmatch(name)) and owner not in ("out", "assets") and not os.path.exists(owner)


def find(name, config_file, weights_file):
    """(path of the config, path of the weights) of a checkpoint: a directory, its weights file, or a hub name."""
    name = os.fspath(name)
    if os.path.isfile(name):
        return os.path.join(os.path.dirname(name), config_file), name
    if is_hub_name(name):
        try:
            return hub_file(name, config_file), hub_file(name, weights_file)
        except UserError as error:
            raise UserError(f"{name}: not a file or directory here; {error}") from None
    if not os.path.isdir(name):
        raise UserError(f"there is no directory {shown(name)[1:-1]}, nor is that a name on the hub (owner/name)")
    return os.path.join(name, config_file), os.path.join(name, weights_file)


def cache_directory():
    """Where huggingface_hub keeps its files, by the same environment variables."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def hub_file(repository, file):
    """A file of a hub repository -> its path in the cache, downloaded if it is not there. Raises `UserError`.

    models--OWNER--NAME/ refs/main (the commit's name)   blobs/ETAG (the contents)
                         snapshots/COMMIT/FILE -> ../../blobs/ETAG
    Where there are no links, the contents are moved to snapshots/COMMIT/FILE, as huggingface_hub does.
    """
    cache, folder = cache_directory(), "models--" + repository.replace("/", "--")
    reference = os.path.join(cache, folder, "refs", "main")
    commit = open(reference).read().strip() if os.path.isfile(reference) else ""
    path = os.path.join(cache, folder, "snapshots", commit or "none", file)
    if os.path.isfile(path):  # False for a link whose blob was deleted
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{repository}: {file} is not in the cache {cache}, and HF_HUB_OFFLINE forbids downloading it")
    # the commit that is here already, if any: config and weights must belong together
    commit, etag, size, url = hub_header(repository, file, commit or "main")
    blob = os.path.join(cache, folder, "blobs", etag)
    path = os.path.join(cache, folder, "snapshots", commit, file)
    try:
        with locked(os.path.join(cache, ".locks", folder, etag + ".lock")):  # the others wait, then find the file
            if not os.path.isfile(blob) and not os.path.isfile(path):
                fetch(url, blob, etag, size, f"{repository}/{file}")
            if not os.path.isfile(path):
                place(blob, path)
            if not os.path.isfile(reference):
                with replacing(reference) as temporary, open(temporary, "w") as out:
                    out.write(commit)
    except OSError as error:  # no space, no permission
        raise UserError(f"{cache}: {repository}/{file} cannot be stored there ({error.strerror or error})") from None
    return path


def place(blob, path):
    """Put a link to `blob` at `path`, or `blob` itself where there are no links."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.lexists(path):  # a link whose blob was deleted
        os.remove(path)
    try:
        os.symlink(os.path.relpath(blob, os.path.dirname(path)), path)
    except OSError:  # exFAT, some network drives, Windows without developer mode
        os.replace(blob, path)


def hub_header(repository, file, revision):
    """Ask the hub for (commit, etag, size, address) of a file, without its contents. Raises `UserError`."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/{revision}/{file}"
    for _ in range(5):  # redirects
        # the hub's own answer has the headers, not the storage behind it
        answer = ask("HEAD", url, allow_redirects=False)
        moved = answer.headers.get("Location", "")
        if answer.status_code not in (301, 302, 307, 308) or not moved.startswith("/"):
            break
        url = endpoint + moved  # the repository has another name now
    if answer.status_code in (401, 403):
        raise UserError(f"{repository}: the hub answered {answer.status_code}: it does not exist, or it is gated: "
                        f"accept its licence at {endpoint}/{repository} and put a valid access token into HF_TOKEN")
    if answer.status_code >= 400:
        raise UserError(f"{repository}: the hub answered {answer.status_code} for {file} at {url}")
    headers = answer.headers
    commit, etag = headers.get("X-Repo-Commit", ""), headers.get("X-Linked-Etag") or headers.get("ETag", "")
    etag, size = etag.removeprefix("W/").strip('"'), headers.get("X-Linked-Size") or headers.get("Content-Length", "")
    if not size.isdecimal():
        raise UserError(f"{url}: the server does not say how long the file is")
    # These become names of files, so they have to look like the hub's own. A plain file server has none.
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        commit = "main"
    url = f"{endpoint}/{repository}/resolve/{commit}/{file}"
    if not re.fullmatch(r"[\w-]{1,128}", etag, re.ASCII):
        etag = "other-" + hashlib.sha1(f"{url} {etag} {size}".encode()).hexdigest()
    return commit, etag, int(size), url


def ask(method, url, headers={}, **options):
    """requests.request, with HF_TOKEN if there is one and without compression; no connection raises `UserError`.

    A token that is refused is left out: with an expired one, the hub refuses even what is public.
    """
    # auth: whatever it is, it keeps requests from sending what ~/.netrc says of this host in place of the token
    options |= {"timeout": (10, 30), "auth": lambda request: request}
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        if token := os.environ.get("HF_TOKEN", "").strip():
            answer = requests.request(method, url, headers=headers | {"Authorization": f"Bearer {token}"}, **options)
            if answer.status_code != 401:
                return answer
            answer.close()
        return requests.request(method, url, headers=headers, **options)
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"{url}: cannot be reached ({type(error).__name__}); if this machine is offline, copy the "
                        f"files here and name their directory") from None


def fetch(url, path, etag, size, label):
    """Download `size` bytes to `path`, going on where an earlier attempt broke off; their digest must be their etag."""
    part, failures = path + ".incomplete", 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(part, "ab").close()
    while (have := os.path.getsize(part)) < size:
        try:
            problem = receive(url, part, have, size, label)
        except (requests.RequestException, UserError) as error:  # broken off; no connection
            problem = type(error).__name__
        if os.path.getsize(part) <= have:
            failures += 1
            if failures == 5:
                raise UserError(f"{label}: the connection broke at {have:,} of {size:,} bytes ({problem}); run again "
                                f"to go on from there")
            time.sleep(RETRY_SECONDS * failures)
    if os.path.getsize(part) != size or file_digest(part, etag) not in (None, etag):
        os.remove(part)
        raise UserError(f"{label}: what arrived is not the file (its digest or length is wrong); nothing was kept, try "
                        f"again")
    os.replace(part, path)


def receive(url, part, have, size, label):
    """Ask for what is behind the first `have` bytes and append it to `part`, with one line of progress; stops as soon
    as there are more than `size`. Returns what went wrong if nothing came."""
    with ask("GET", url, {"Range": f"bytes={have}-"} if have else {}, stream=True) as answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status_code != 200 and not (answer.status_code == 206 and goes_on):
            return f"the server answered {answer.status_code}"
        with open(part, "ab" if answer.status_code == 206 else "wb") as file:  # 200: from the beginning
            shown_at = 0.0
            for chunk in answer.iter_content(2**16):  # if the connection breaks, the chunk under way is lost
                file.write(chunk)
                have = file.tell()
                if size > 2**22 and (time.time() > shown_at + 0.5 or have >= size):
                    print(f"\r{label}: {have / 1e6:,.0f} of {size / 1e6:,.0f} MB", end="\n" if have >= size else "",
                          file=sys.stderr, flush=True)
                    shown_at = time.time()
                if have > size:
                    break
    return "closed too early"


def file_digest(path, etag):
    """The digest that an etag of this length is: sha256 for large files, git's sha1 for small ones; None if neither."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return None
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()

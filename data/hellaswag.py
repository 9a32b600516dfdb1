"""
Download HellaSwag's validation set (Zellers et al. 2019) into data/hellaswag_val.jsonl: 10,042 questions, 12 MB.

    python data/hellaswag.py

After an interruption the same command goes on where it stopped.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import os
import sys

import requests

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hellaswag_val.jsonl")


def download(part):
    """Add to the file `part` what it lacks of the questions."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(URL, headers=headers, stream=True, timeout=30) as response:
        response.raise_for_status()
        with open(part, "ab" if response.status_code == 206 else "wb") as f:  # 200: the server begins anew
            for piece in response.iter_content(2**16):
                f.write(piece)
                if sys.stderr.isatty():
                    print(f"{f.tell() / 1e6:.1f} of {SIZE / 1e6:.1f} MB", end="\r", file=sys.stderr)


def main():
    if os.path.exists(PATH) and os.path.getsize(PATH) == SIZE:
        print(f"{PATH} is there already")
        return
    part = PATH + ".part"
    try:
        if not os.path.exists(part) or os.path.getsize(part) != SIZE:
            download(part)
    except (OSError, KeyboardInterrupt) as error:  # those of requests are OSErrors, too
        lost = isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError))
        reason = f"no connection to {URL}" if lost else str(error) or "interrupted"
        raise SystemExit(f"hellaswag.py: {reason}; the same command goes on where it stopped") from None
    size = os.path.getsize(part)
    if size != SIZE:
        os.remove(part)
        raise SystemExit(f"hellaswag.py: {URL} has {size:,} bytes instead of {SIZE:,}")
    os.replace(part, PATH)
    print(PATH)


if __name__ == "__main__":
    main()

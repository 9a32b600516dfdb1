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
import threading

import requests

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hellaswag_val.jsonl")


def receive(part):
    """Add to the file `part` what it lacks of the questions."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(URL, headers=headers, stream=True, timeout=30) as response:
        response.raise_for_status()
        with open(part, "ab") as f:
            try:
                import fcntl

                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, even if it is killed
            except ImportError:  # Windows, where two runs do not exclude each other
                pass
            except BlockingIOError:
                raise OSError("another run is at work") from None
            place = response.headers.get("Content-Range", f"bytes {have}-")
            if response.status_code == 200:  # all of it
                f.truncate(0)
            elif f.tell() != have or not place.startswith(f"bytes {have}-"):
                raise ValueError("another piece came than was asked for")
            for piece in response.iter_content(2**16):
                f.write(piece)
                if f.tell() > SIZE:
                    break


def give_up():
    print("hellaswag.py: not done after ten minutes; the same command goes on where it stopped", file=sys.stderr)
    os._exit(1)  # wherever the download hangs


def main():
    if os.path.exists(PATH) and os.path.getsize(PATH) == SIZE:
        print(f"{PATH} is there already")
        return
    part, clock = PATH + ".part", threading.Timer(600, give_up)
    clock.start()
    try:
        if not os.path.exists(part) or os.path.getsize(part) != SIZE:
            receive(part)
    except (OSError, ValueError, KeyboardInterrupt) as error:  # those of requests are OSErrors, too
        lost = isinstance(error, requests.RequestException)
        reason = f"no connection to {URL} ({type(error).__name__})" if lost else str(error) or "interrupted"
        raise SystemExit(f"hellaswag.py: {reason}; the same command goes on where it stopped") from None
    finally:
        clock.cancel()
    size = os.path.getsize(part)
    if size != SIZE:
        os.remove(part)
        raise SystemExit(f"hellaswag.py: {URL} has {size:,} bytes instead of {SIZE:,}")
    os.replace(part, PATH)
    print(PATH)


if __name__ == "__main__":
    main()

"""
Download HellaSwag's validation set (Zellers et al. 2019) into data/hellaswag_val.jsonl: 10,042 questions, 12 MB.

    python data/hellaswag.py
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


def give_up(part):
    print("hellaswag.py: not done after ten minutes; try again", file=sys.stderr, flush=True)
    os.remove(part)
    os._exit(1)  # wherever the download hangs


def main():
    if os.path.exists(PATH) and os.path.getsize(PATH) == SIZE:
        print(f"{PATH} is there already")
        return
    part = f"{PATH}.{os.getpid()}.part"  # its own, if two run at once
    clock = threading.Timer(600, give_up, [part])
    clock.start()
    try:
        with open(part, "wb") as f, requests.get(URL, stream=True, timeout=30) as response:
            response.raise_for_status()
            for piece in response.iter_content(2**16):
                f.write(piece)
                if f.tell() > SIZE:
                    break
        if os.path.getsize(part) != SIZE:
            raise ValueError(f"{URL} has {os.path.getsize(part):,} bytes instead of {SIZE:,}")
        os.replace(part, PATH)
    except Exception as error:  # a server that misbehaves leads to nearly any
        raise SystemExit(f"hellaswag.py: {' '.join(str(error).split()):.300}") from None
    finally:
        clock.cancel()
        if os.path.exists(part):
            os.remove(part)
    print(PATH)


if __name__ == "__main__":
    main()

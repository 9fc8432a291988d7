"""Tries every family of the installed transformers: `generate` alone and with a draft."""
import argparse
import json
import os
import signal
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from survey_pairs import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT_NAMES
from survey_pairs import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_NAMES
from survey_pairs import Row, describe, survey


def isolated(function, seconds):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(seconds)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        data = json.dumps(function())
        os.write(write, data.encode())
        os._exit(0)
    os.close(write)
    data = b""
    while chunk := os.read(read, 65536):
        data += chunk
    os.close(read)
    _, status = os.waitpid(pid, 0)
    return json.loads(data) if data else status


def one(name, seconds=60):
    with_images = name in IMAGE_NAMES
    def function():
        try: return survey(name, with_images).as_dict()
        except BaseException as e: return Row(name, status="failed", note=describe(e)).as_dict()
    start = time.time()
    got = isolated(function, seconds)
    if isinstance(got, int):
        got = Row(name, status="failed", note=f"ended by signal {got}").as_dict()
    got["seconds"] = time.time() - start
    return got


if __name__ == "__main__":
    names = sys.argv[1:]
    if names == ["A"]: names = list(IMAGE_NAMES)
    if names == ["B"]: names = [n for n in TEXT_NAMES if n not in IMAGE_NAMES]
    import transformers
    from transformers import LlamaForCausalLM, AutoModelForImageTextToText
    rows = []
    for name in names:
        r = one(name); rows.append(r)
        print(f"{name:24s} {r['seconds']:4.1f} {r['status']:9s} T[{r['text'][:60]}] I[{r['image'][:330]}] tau={r['tau'] and round(r['tau'],2)} {r['dtype'][5:]} {r['note'][:230]}", flush=True)
    import collections
    print(collections.Counter(r['status'] for r in rows))

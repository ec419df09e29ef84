"""Small things that the tests of evaluation measure: a tokenizer, models, held-out documents, a benchmark."""

import hashlib
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = """the a of and to in is was it for on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after words called just where most know""".split()  # noqa: SIM905
SHARED = Path(__file__).parents[3] / "shared"


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer):
    """Folder of a small Phi: `make_model(seed)`; context of 256 tokens."""

    def make(seed: int = 0, scale: float = 0.02, **fields) -> Path:
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
        network = transformers.PhiForCausalLM(transformers.PhiConfig(**{**shape, **fields}))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, scale)
        folder = tmp_path_factory.mktemp("model") / f"model-{seed}"
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def heldout(tmp_path_factory) -> Path:
    """A folder like a run's `data/documents`: 60 documents of two sources, of sentences."""
    rng = random.Random(0)
    texts = [" ".join(f"{text(rng, rng.randint(6, 12)).capitalize()}." for _ in range(14)) for _ in range(60)]
    columns = {
        "id": [hashlib.sha256(t.encode()).hexdigest()[:16] for t in texts],
        "text": texts,
        "source": ["manual" if i % 3 else "licences" for i in range(60)],
    }
    folder = tmp_path_factory.mktemp("documents")
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "heldout-00000.parquet")
    return folder


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory) -> Path:
    """A folder laid out like the Hub, with ARC-Easy's and Winogrande's columns and nonsense in them."""
    rng = random.Random(1)
    root = tmp_path_factory.mktemp("benchmarks")

    def arc(count: int) -> pyarrow.Table:
        return pyarrow.Table.from_pylist([
            {"id": str(i), "question": text(rng, 8)}
            | {"choices": {"text": [text(rng, rng.randint(1, 4)) for _ in range(4)], "label": ["A", "B", "C", "D"]}}
            | {"answerKey": "ABCD"[rng.randrange(4)]}
            for i in range(count)
        ])  # fmt: skip

    def winogrande(count: int) -> pyarrow.Table:
        return pyarrow.Table.from_pylist([
            {"sentence": f"{text(rng, 4)} _ {text(rng, 5)}", "answer": str(rng.randrange(1, 3))}
            | {name: text(rng, rng.randint(1, 3)) for name in ("option1", "option2")}
            for _ in range(count)
        ])  # fmt: skip

    write(root / "allenai/ai2_arc", "ARC-Easy", {"train": arc(8), "validation": arc(8), "test": arc(120)})
    write(root / "allenai/winogrande", "winogrande_xl", {"train": winogrande(20), "validation": winogrande(40)})
    return root


def write(folder: Path, config: str, splits: dict[str, pyarrow.Table]) -> None:
    """One configuration of a dataset in Hub layout."""
    (folder / config).mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    for split, table in splits.items():
        pyarrow.parquet.write_table(table, folder / config / f"{split}.parquet")


@pytest.fixture(scope="session")
def write_dataset():
    """`write_dataset(folder, config, splits)`: one configuration of a dataset in Hub layout."""
    return write

"""The zoo's tokenizer: fitted by SentencePiece, shipped as it is and as a `tokenizers` file with the same pieces."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


def fit_sentencepiece(documents: Iterable[str], out: Path, vocab_size: int, sample_chars: int, seed: int) -> Path:
    """Fit a unigram model on about `sample_chars` characters of `documents`; writes `out/tokenizer.model`."""
    import sentencepiece

    pool = list(documents)
    random.Random(seed).shuffle(pool)
    lines: list[str] = []
    chars = 0
    for document in pool:
        lines += [line for line in document.split("\n") if line]
        chars += len(document)
        if chars >= sample_chars:
            break
    out.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,  # a model written to a path would hold that path
        vocab_size=vocab_size,
        model_type="unigram",
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        # Text must come back as it went in (code needs its indentation), so nothing is normalised or added.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        max_sentence_length=20000,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=2,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    return out / "tokenizer.model"


def save_tokenizer(model_file: Path, out: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`, from a SentencePiece model."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Word by word, as SentencePiece does: no piece crosses a newline or the start of a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, pieces.bos_id())]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, UNK, BOS, EOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=context,
        padding_side="left",  # what batched generation needs
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(out))
    table = out / "tokenizer.json"
    compact = json.dumps(json.loads(table.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
    table.write_text(compact, encoding="utf-8")
    config_file = out / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every transformers 4 and 5 resolves
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The contrastive recipes: numbers by hand, what each kind of amateur reads, and whole runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from blt_jax.data import word_problems
from blt_jax.data.tokenizers import TokenizerConfig
from blt_jax.data.word_problems import WordProblem
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params
from blt_jax.interop.hugging_face import save_pretrained
from blt_jax.recipes import contrastive, contrastive_report, contrastive_text
from blt_jax.recipes.contrastive import AmateurComparison, AmateurKind, ContrastiveProblems
from blt_jax.recipes.contrastive_questions import (
    ContrastiveQuestions,
    last_number,
    read_questions,
)
from blt_jax.train.pretraining import make_context
from experiments import contrastive_decoding as runs

PROBLEM = WordProblem("mia", "coins", 7, (5, -3), ("finds", "eats"))


def test_candidates_and_results():
    texts = contrastive.candidates(PROBLEM)
    assert texts == (
        "7 + 5 = 12 ; 12 - 3 = 9 ; so 9",
        "7 + 5 = 12 ; 12 - 3 = 3 ; so 3",
        "7 + 5 = 12 ; so 12",
        "7 + 5 = 12 ; 12 - 3 = 8 ; so 8",
    )
    assert contrastive.results(texts[0]) == [12, 9]
    assert contrastive.results("7 + = 5 =") == [5]
    for problem in word_problems.word_problems(50):
        assert len(set(contrastive.candidates(problem))) == 4


def test_numbers_of_an_outcome():
    texts = ("7 + 5 = 12 ; 12 - 3 = 9 ; so 9", "7 + 5 = 12 ; 12 - 3 = 3 ; so 3", "7 + 5")
    outcome = contrastive.Outcome((PROBLEM,) * 3, texts, np.array([1.0, 0.0, 0.0]))
    assert outcome.numbers() == {
        "exact_match": pytest.approx(1 / 3),
        "shortcut_rate": pytest.approx(1 / 3),
        "copy_rate": pytest.approx((0 + 0.5 + 0) / 3),
    }


def test_negative_prompts_end_with_the_story():
    tokens, lengths = contrastive.negative_prompts([PROBLEM])
    text = word_problems.decode(tokens[0, : lengths[0]])
    example, rest = text.split(" how many ? ", 1)
    assert rest.endswith(PROBLEM.story()) and lengths[0] == tokens.shape[1]
    working = rest.removesuffix(" " + PROBLEM.story())
    assert word_problems.read_answer(working) == int(example.split()[-2])


def test_bootstrap_interval():
    values = np.repeat([0.0, 1.0], 200)
    low, high = contrastive_report.bootstrap_interval(values)
    assert 0.43 < low < 0.47 and 0.53 < high < 0.57  # 0.5 ± 1.96 · 0.5 / 20
    assert contrastive_report.bootstrap_interval(np.ones(3)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="empty"):
        contrastive_report.bootstrap_interval(())


def test_repetition():
    numbers = contrastive_text.repetition([b"a b a b a", b"x, y"])
    assert numbers["rep_2"] == pytest.approx(2 / 6)
    assert numbers["rep_3"] == pytest.approx(1 / 4)
    assert numbers["rep_4"] == 0
    assert numbers["diversity"] == pytest.approx(4 / 6 * 3 / 4)
    assert contrastive_text.repetition([b""])["diversity"] == 1


KINDS = (
    *(AmateurKind.NONE, AmateurKind.EARLY, AmateurKind.PROMPT, AmateurKind.SHORTENED),
    *(AmateurKind.SMALL_PROMPT, AmateurKind.NGRAM),
)


def test_training_texts_are_whole_documents():
    small = runs.smoke().small
    texts = list(contrastive.training_texts(small, shortcut_share=0.3))
    assert len(texts) >= small.total_steps * small.data.batch_size
    for ids in texts:
        assert ids[0] == word_problems.BOS_ID and ids[-1] == word_problems.EOS_ID
    again = contrastive.training_texts(small, shortcut_share=1.0)
    assert any(not np.array_equal(a, b) for a, b in zip(texts, again, strict=False))


def context(folder):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return make_context(folder, mesh, jax.random.key(0))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Six kinds of amateurs of the smoke run's models, over one seed."""
    folder = tmp_path_factory.mktemp("amateurs")
    smoke = runs.smoke()
    kinds = tuple(
        (kind.value, dataclasses.replace(smoke, kind=kind, votes=(1,), voters=2)) for kind in KINDS
    )
    return folder, AmateurComparison(runs=kinds, seeds=(0,)).run(context(folder))


def test_kinds_of_amateurs_share_their_models(comparison):
    folder, numbers = comparison
    trained = sorted(path.name for path in (folder / "shared").iterdir())
    assert trained == ["expert_0.3", "small_0.3"]
    greedy = {numbers[f"{kind.value}/exact_match_alpha_0_beta_0"] for kind in KINDS}
    assert greedy == {numbers["none/exact_match"]}
    for kind in KINDS:
        for name in ("copy_rate", "vote_1", "ranking_accuracy", "ranking_above_shortcut"):
            assert 0 <= numbers[f"{kind.value}/{name}"] <= 1
    assert numbers["none/exact_match_gain"] == 0
    rankings = {numbers[f"{kind.value}/ranking_accuracy"] for kind in KINDS}
    assert len(rankings) > 1
    for name in ("figures/amateurs.png", "texts/amateurs.txt", "comparison.json"):
        assert (folder / name).stat().st_size > 100
    text = (folder / "early" / "seed_0" / "texts" / "examples.txt").read_text()
    assert "solved by the contrast alone" in text


def test_a_run_on_text(tmp_path):
    config = runs.text_smoke()
    numbers = config.run(context(tmp_path))
    for beta in ("0", "0.5"):
        assert 0 <= numbers[f"diversity_beta_{beta}"] <= 1
        best = numbers[f"ranking_accuracy_beta_{beta}"]
        assert 0 <= best <= numbers[f"above_repetition_beta_{beta}"] <= 1
    assert numbers["diversity_true"] > 0
    assert "=== prompt" in (tmp_path / "texts" / "continuations.txt").read_text()
    assert (tmp_path / "figures" / "text.png").stat().st_size > 1000


def test_questions_to_models_in_folders(tmp_path):
    for name, seed, width in (("expert", 0, 16), ("amateur", 1, 8)):
        built = runs.model(runs.BYTES, 1, width).build()
        save_pretrained(built, init_params(built, jax.random.key(seed)), tmp_path / name)
    lines = [{"question": f"1 + {n}?", "answer": f"as 1,0{n} #### 1,00{n}"} for n in (2, 3, 4)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "shots.txt").write_text("Q: 1?\nA: 1\n\n")
    config = ContrastiveQuestions(
        expert=str(tmp_path / "expert"),
        amateur=str(tmp_path / "amateur"),
        questions=str(questions),
        shots=str(tmp_path / "shots.txt"),
        tokenizer=TokenizerConfig(),
        batch_size=2,
        new_tokens=4,
    )
    numbers = config.run(context(tmp_path / "run"))
    assert 0 <= numbers["exact_match"] <= 1 and not any("vote" in name for name in numbers)
    text = (tmp_path / "run" / "texts" / "examples.txt").read_text()
    assert "of 3" in text
    asked, solved = read_questions(str(questions), 2)
    assert asked == ["1 + 2?", "1 + 3?"] and [last_number(s) for s in solved] == [1002, 1003]
    voting = dataclasses.replace(
        config, votes=(1, 3), vocab_size=200, amateur_tokenizer=TokenizerConfig()
    )
    numbers = voting.run(context(tmp_path / "votes"))
    names = {f"vote_{n}{who}" for n in (1, 3) for who in ("", "_expert")}
    assert names < numbers.keys() and all(0 <= numbers[name] <= 1 for name in names)
    with pytest.raises(ValueError, match="votes="):
        dataclasses.replace(config, votes=(0,))
    questions.write_text('{"question": "1?", "answer": "none"}')
    with pytest.raises(ValueError, match="line 1 needs a question, and an answer with a number"):
        config.run(context(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"must hold \{question\}"):
        dataclasses.replace(config, prompt="Q:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_steps": 0}, "early_steps=0: must be above 0 and below the expert's 6"),
        ({"early_steps": 6}, "early_steps=6"),
        ({"problems": 0}, "problems=0"),
        ({"votes": ()}, "votes="),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"betas": (-1.0,)}, "beta=-1.0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(runs.smoke(), **changes)


def test_bad_models():
    smoke = runs.smoke()
    small = dataclasses.replace(smoke.small.model, vocab_size=50)
    with pytest.raises(ValueError, match=r"small.model.*vocab_size >= "):
        ContrastiveProblems(
            expert=smoke.expert, small=dataclasses.replace(smoke.small, model=small)
        )
    with pytest.raises(ValueError, match="must hold 0"):
        dataclasses.replace(runs.text_smoke(), betas=(0.5,))

"""
A draft of this package beside an assistant of Google's kind (`gemma4_assistant`), on one small Gemma 4 with random
weights. Both are fitted briefly to text of the target. Prints for each whether its tokens are those of the target
alone, tau, and ms a token.

    python examples/studies/gemma4_assistant.py

A random target writes text that follows a permutation of its vocabulary, so the figures show that both work side by
side in one process and what a round costs at this size. They do not show which of the two guesses better on a trained
Gemma 4.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    HfArgumentParser,
    PreTrainedModel,
)

from msd_hf import MSDDraftModel


VOCAB_SIZE, HIDDEN_SIZE, WINDOW = 512, 128, 32
NUM_STEPS_AHEAD = 3  # tokens that the assistant guesses from one state while it is fitted


@dataclass
class StudyArguments:
    steps: int = field(default=150, metadata={"help": "Training steps of each."})
    prompts: int = field(default=10, metadata={"help": "Prompts that are answered."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer."})
    num_assistant_tokens: int = field(default=5, metadata={"help": "Guesses of a chain; a tree is as deep."})
    num_nodes: int = field(default=24, metadata={"help": "Nodes of a tree."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and prompts."})


def text_config(num_layers: int, hidden_size: int, **fields: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        layer_types=["sliding_attention", "full_attention"] * (num_layers // 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        sliding_window=WINDOW,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )


def make_target() -> Gemma4ForCausalLM:
    """A target of the kind of E2B: half of its layers share keys, and each has an input of its own. After a token t
    comes mostly p(t), for a random permutation p; what the layers add makes it another token now and then."""
    shared = {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE}
    config = text_config(8, HIDDEN_SIZE, initializer_range=0.08, tie_word_embeddings=False, **shared)
    target = Gemma4ForCausalLM(config).eval()
    embedding, head = target.get_input_embeddings().weight.data, target.get_output_embeddings().weight.data
    torch.nn.init.normal_(embedding, std=0.05)
    head.normal_(std=0.05)
    head[torch.randperm(VOCAB_SIZE)] += 2 * embedding
    for name, parameter in target.named_parameters():
        if "layers" in name and "post_" in name:  # the norms behind attention, MLP and the layer's own input
            parameter.data *= 0.25
    target.generation_config.pad_token_id = 0
    return target


@torch.no_grad()
def read(target: Gemma4ForCausalLM) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sampled text of the target `[B, T]`, its last hidden states `[B, T, H]`, and the keys and values that it shares
    with assistants."""
    ids = torch.randint(1, VOCAB_SIZE, (16, 4))
    ids = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=True, temperature=0.7)
    seen = target.model(ids, use_cache=False, return_shared_kv_states=True)
    return ids, seen.last_hidden_state, dict(seen.shared_kv_states)


def loss_of_draft(draft: MSDDraftModel, target: Gemma4ForCausalLM, read: Any) -> torch.Tensor:
    ids, states, _ = read
    embeds = target.get_input_embeddings()(ids)
    out = draft(embeds[:, 1:-1], states[:, :-2]).last_hidden_state
    logits = target.get_output_embeddings()(out)
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()) + functional.smooth_l1_loss(
        out, states[:, 1:-1]
    )


def loss_of_assistant(assistant: Gemma4AssistantForCausalLM, target: Gemma4ForCausalLM, read: Any) -> torch.Tensor:
    """All positions at once. The assistant reads the target's keys before the last token; its next guesses stand at
    the same position and read its own state, as in `generate`."""
    ids, states, shared = read
    count = ids.shape[1] - NUM_STEPS_AHEAD - 1
    positions = torch.arange(1, count + 1)
    distance = positions.unsqueeze(1) - torch.arange(ids.shape[1])
    hidden = {"full_attention": distance < 1, "sliding_attention": (distance < 1) | (distance > WINDOW)}
    masks = {kind: torch.zeros(mask.shape).masked_fill(mask, -1e9)[None, None] for kind, mask in hidden.items()}
    embeds, state, loss = target.get_input_embeddings()(ids), states[:, :count], torch.zeros(())
    for step in range(NUM_STEPS_AHEAD):
        inputs = torch.cat([embeds[:, 1 + step : 1 + step + count], state], dim=-1)
        out = assistant.model(
            inputs_embeds=assistant.pre_projection(inputs),
            attention_mask=masks,
            position_ids=positions.unsqueeze(0),
            shared_kv_states=dict(shared),
            use_cache=False,
            output_hidden_states=True,  # or 5.24 would cut inputs by layer, which an assistant has not
        ).last_hidden_state
        goal = ids[:, 2 + step : 2 + step + count]
        loss = loss + functional.cross_entropy(assistant.lm_head(out).flatten(0, 1), goal.flatten())
        state = assistant.post_projection(out)
    return loss / NUM_STEPS_AHEAD


def fit(model: PreTrainedModel, loss_of: Any, target: Gemma4ForCausalLM, batches: list[Any], steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        loss = loss_of(model, target, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def answer(target: Gemma4ForCausalLM, ids: torch.Tensor, count: int, helper: Any) -> tuple[list[int], float, float]:
    """The tokens of an answer, tokens a forward behind the prompt, and ms a token."""
    forwards = []
    handle = target.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    options = {} if helper is None else {"assistant_model": helper}
    start = time.perf_counter()
    tokens = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    elapsed = time.perf_counter() - start
    handle.remove()
    return tokens[0].tolist(), (count - 1) / (len(forwards) - 1), 1000 * elapsed / count


def main() -> None:
    (args,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    target = make_target().requires_grad_(False)
    fields = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    config = Gemma4AssistantConfig(text_config=text_config(2, HIDDEN_SIZE, **fields), backbone_hidden_size=HIDDEN_SIZE)
    assistant = Gemma4AssistantForCausalLM(config)
    # An assistant has a head of its own. It starts as the target's, because so few steps teach it none.
    assistant.lm_head.weight.data.copy_(target.lm_head.weight)
    assistant.generation_config.num_assistant_tokens = args.num_assistant_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    draft = MSDDraftModel.from_target(target)
    batches = [read(target) for _ in range(16)]
    fit(draft, loss_of_draft, target, batches, args.steps)
    fit(assistant, loss_of_assistant, target, batches, args.steps)
    chain = {"num_assistant_tokens": args.num_assistant_tokens + 1, "tree_top_k": 1}
    tree = {"num_assistant_tokens": args.num_nodes, "tree_top_k": 4}
    helpers: dict[str, tuple[Any, dict[str, int]]] = {
        "target alone": (None, {}),
        "assistant, chain": (assistant, {}),
        "draft, chain": (draft, {**chain, "tree_depth": args.num_assistant_tokens - 1}),
        "draft, tree": (draft, {**tree, "tree_depth": args.num_assistant_tokens - 1}),
    }
    results: dict[str, list[tuple[bool, float, float]]] = {name: [] for name in helpers}
    for number in range(args.prompts + 1):
        ids = torch.randint(1, VOCAB_SIZE, (1, 24))
        expected = None
        for name, (helper, settings) in helpers.items():
            if helper is draft:
                for setting, value in settings.items():
                    setattr(draft.generation_config, setting, value)
            tokens, tau, cost = answer(target, ids, args.max_new_tokens, helper)
            expected = tokens if expected is None else expected
            if number:  # the first one warms up
                results[name].append((tokens == expected, tau, cost))
    table = Table("", "parameters", "identical", "tau", "ms a token")
    for name, rows in results.items():
        size = "" if helpers[name][0] is None else f"{helpers[name][0].num_parameters():,}"
        table.add_row(
            name,
            size,
            f"{sum(row[0] for row in rows)}/{len(rows)}",
            f"{statistics.mean(row[1] for row in rows):.2f}",
            f"{statistics.median(row[2] for row in rows):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

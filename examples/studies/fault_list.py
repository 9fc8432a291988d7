"""Small faults at subtle spots of the package, by subject. `faults.py` puts them in one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """
    One fault.

    Args:
        name: what is wrong.
        file: below `msd_hf`.
        old: text that stands in the file once.
        new: text in its place.
        tests: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


COMPILED, DECODING = "tests/test_compiled_edges.py", "tests/test_decoding_edges.py"
CHECKS, HEAD, TREES = "tests/test_checks_edges.py", "tests/test_draft_head.py", "tests/test_tree_policy.py"
SAMPLES, TRAINED = "tests/test_sample_edges.py", "tests/test_training_edges.py"
THREADS = "tests/test_threads.py"
KERNELS, STATES = "tests/test_recurrent_kernels.py", "tests/test_recurrent_layer.py"
FAMILIES, UNUSUAL = "tests/test_recurrent_families.py", "tests/test_unusual_targets.py"
ROTARY, CACHE = "tests/test_drafting_step.py", "tests/test_transaction.py tests/test_cache.py"
INTERRUPTED = f"{DECODING} {CACHE} -k interrupt"
LATE, PAUSES = f"{COMPILED} -k late", f"{TREES} -k 'paus or trial or comes_back or learnt or paid'"
SHOWN, WINDOW, INDEX = f"{DECODING} -k drafted_token", f"{DECODING} -k window", "tests/test_suffix_branch.py -k index"
EAGLE3_GOLDEN, EAGLE3_LOADING = "tests/test_eagle3_golden.py", "tests/test_other_drafts.py"
EAGLE3_GENERATE, EAGLE3_REFERENCE = (
    "tests/test_eagle3_generate.py -k layers",
    "tests/test_draft_reference.py -k eagle3",
)

# Most of these passed the whole suite once, when they were put in by hand. Their tests are younger.
FAULTS = {
    "data": [
        Fault(
            "a broken last sample ends training",
            "training/mixture.py",
            "((place + offset) % len(dataset) for",
            "(place + offset for",
            SAMPLES,
        ),
        Fault(
            "a null in `complete` counts as cut",
            "training/data/reading.py",
            'complete=sample.get("complete") is not False',
            'complete=bool(sample.get("complete", True))',
            SAMPLES,
        ),
        Fault(
            "a line separator of Unicode ends a sample",
            "training/data/files.py",
            'text.split("\\n")',
            "text.splitlines()",
            SAMPLES,
        ),
        Fault(
            "a null in `images` hides `image`",
            "training/data/turns.py",
            'sample.get("images") or sample.get("image")',
            'sample.get("images", sample.get("image"))',
            SAMPLES,
        ),
        Fault(
            "a system field doubles a system turn",
            "training/data/turns.py",
            ' and messages[0][0] != "system"',
            "",
            SAMPLES,
        ),
    ],
    "training": [
        Fault(
            "places of samples do not depend on the seed",
            "training/curriculum.py",
            'random.Random(f"{self.seed}/{kind}/{turn}")',
            'random.Random(f"{kind}/{turn}")',
            "tests/test_training_curriculum.py",
        ),
        Fault(
            "noise is dropped before several passes",
            "training/objective.py",
            "if draft.training and recipe.noise > 0:",
            "if draft.training and recipe.noise > 0 and recipe.unroll_passes == 1:",
            TRAINED,
        ),
        Fault(
            "noise does not depend on the seed",
            "training/objective.py",
            "manual_seed(self.args.seed * 1_000_003 + number)",
            "manual_seed(number)",
            TRAINED,
        ),
        Fault(
            "`data_seed` has no effect",
            "training/trainer.py",
            "args.seed if args.data_seed is None else args.data_seed",
            "args.seed",
            TRAINED,
        ),
        Fault(
            "a `data_seed` of 0 is the seed",
            "training/trainer.py",
            "args.seed if args.data_seed is None else args.data_seed",
            "args.data_seed or args.seed",
            TRAINED,
        ),
        Fault(
            "a resumed run forgets the samples that were skipped",
            "training/trainer.py",
            "return self._skipped_before + Counter(self._skipped.values())",
            "return Counter(self._skipped.values())",
            TRAINED,
        ),
        Fault(
            "extraction leaves the target in evaluation mode",
            "training/features/cache.py",
            "            target.train(training)\n",
            "            pass\n",
            TRAINED,
        ),
        Fault(
            "losses of half precision are summed in half precision",
            "training/losses.py",
            "return torch.float64 if states.dtype == torch.float64 else torch.float32",
            "return states.dtype",
            TRAINED,
        ),
    ],
    "decoding": [
        Fault(
            "the attention implementation stays after an error",
            "attention/substitution.py",
            "    try:\n        yield\n    finally:\n        _current.reset(token)\n",
            "    yield\n    _current.reset(token)\n",
            THREADS,
        ),
        Fault(
            "the last position does not follow fed tokens",
            "drafting/drafter.py",
            "        self._last_position += length\n",
            "",
            COMPILED,
        ),
        Fault(
            "the last position does not follow resumed rounds",
            "drafting/fixed.py",
            "        self._last_position += num_fed\n",
            "",
            COMPILED,
        ),
        Fault(
            "the last position does not follow compiled drafting",
            "drafting/fixed.py",
            "        self._last_position += max(counts)\n",
            "",
            LATE,
        ),
        Fault(
            "the last position does not follow device rounds",
            "decoding/device_rounds.py",
            "        self._last_position += self._count\n",
            "",
            LATE,
        ),
        Fault(
            "device rounds reserve slots for the tree alone",
            "decoding/device_rounds.py",
            "return max(self.drafter.settings.num_nodes, self._block_length)",
            "return self.drafter.settings.num_nodes",
            COMPILED,
        ),
        Fault(
            "device rounds reserve slots for the tokens alone",
            "decoding/device_rounds.py",
            "return max(self.drafter.settings.num_nodes, self._block_length)",
            "return self._block_length",
            COMPILED,
        ),
        Fault(
            "an interrupted batch is not cut to its shortest row",
            "kv/transaction.py",
            "            truncate(self.cache, min(lengths))\n",
            "",
            INTERRUPTED,
        ),
        Fault(
            "the window inside a tree is dropped",
            "attention/masks.py",
            "        visible = visible & (places.unsqueeze(1) >= first.unsqueeze(2))\n        slots",
            "        slots",
            WINDOW,
        ),
        Fault(
            "the window before a tree is one slot too wide",
            "attention/masks.py",
            "return places - self.window + 1",
            "return places - self.window",
            WINDOW,
        ),
        Fault(
            "the last of two length limits counts",
            "decoding/token_selection.py",
            "criterion.max_length if max_length is None else min(max_length, criterion.max_length)",
            "criterion.max_length",
            f"{DECODING} -k limits",
        ),
        Fault(
            "ties in float64 are not those of float32",
            "decoding/verification.py",
            "return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)",
            "return logits.argmax(-1)",
            f"{DECODING} -k ties",
        ),
        Fault(
            "the last accepted token is shown as not drafted",
            "decoding/verification.py",
            "min(len(nodes) - 1, num_emitted)",
            "min(len(nodes) - 1, num_emitted - 1)",
            SHOWN,
        ),
        Fault(
            "the last accepted token of device rounds is shown as not drafted",
            "decoding/device_rounds.py",
            "[min(self._count - 1, num_emitted)]",
            "[min(self._count - 1, num_emitted - 1)]",
            SHOWN,
        ),
        Fault(
            "image tokens are proposed",
            "tree/suffix.py",
            "self._prompts = prompts.masked_fill(visual_mask, _VISUAL)",
            "self._prompts = prompts",
            f"{DECODING} -k branch",
        ),
    ],
    "checks": [
        Fault(
            "NaN passes the self-check",
            "decoding/trial.py",
            '.nan_to_num(nan=float("inf"))',
            ".nan_to_num(nan=0.0)",
            CHECKS,
        ),
        Fault(
            "a shallow check counts for good",
            "decoding/self_check.py",
            "pair.is_checked = depth == _DEPTH",
            "pair.is_checked = True",
            CHECKS,
        ),
        Fault(
            "longrope ignores padding",
            "target/support.py",
            "if prompt_length > limit and batch_size == 1 and is_full:",
            "if prompt_length > limit and batch_size == 1:",
            CHECKS,
        ),
        Fault(
            "rope_type of an original draft is ignored",
            "draft/translation.py",
            'scaling.pop("rope_type", scaling.pop("type", None))',
            'scaling.pop("type", None)',
            CHECKS,
        ),
        Fault(
            "the old name of rope_type is ignored",
            "draft/translation.py",
            'scaling.pop("rope_type", scaling.pop("type", None))',
            'scaling.pop("rope_type", None)',
            CHECKS,
        ),
        Fault(
            "a missing rms_norm_eps is ours",
            "draft/checkpoints.py",
            '    fields.setdefault("rms_norm_eps", 1e-6)\n    with',
            "    with",
            CHECKS,
        ),
    ],
    "automatic trees and the draft's head": [
        Fault(
            "a draft vocabulary has no cap of logits",
            "drafting/head.py",
            "return self.target.cap(functional.linear(states.to(weight), weight, bias))",
            "return functional.linear(states.to(weight), weight, bias)",
            HEAD,
        ),
        Fault(
            "the whole head has no cap of logits",
            "drafting/head.py",
            "plain_head = None if self._is_capped else function_at(head, draft)",
            "plain_head = function_at(head, draft)",
            HEAD,
        ),
        Fault(
            "log-probabilities in half precision",
            "drafting/head.py",
            "            if logits.dtype in _HALF:\n                logits = logits.float()\n            log_probs",
            "            log_probs",
            HEAD,
        ),
        Fault(
            "costs do not depend on the rows",
            "tree/experience.py",
            "    return (num_rows - 1).bit_length()",
            "    return 0",
            PAUSES,
        ),
        Fault(
            "means are not reset after a pause",
            "tree/experience.py",
            "                self._drafted_tokens, self._drafted_seconds = RunningMean(), RunningMean()\n"
            "            return False",
            "            return False",
            PAUSES,
        ),
        Fault(
            "a pause has no bound",
            "tree/experience.py",
            "min(growth * self._pause, _LONGEST_PAUSE)",
            "growth * self._pause",
            PAUSES,
        ),
    ],
    "what lenient tests let pass": [
        Fault(
            "kinds of samples do not depend on the seed",
            "training/curriculum.py",
            'random.Random(f"{self.seed}/{number}")',
            'random.Random(f"{number}")',
            "tests/test_training_curriculum.py",
        ),
        Fault(
            "tables of rotations repeat",
            "drafting/step.py",
            "rotary_emb(like, positions.unsqueeze(0))",
            "rotary_emb(like, positions.unsqueeze(0) % 1024)",
            ROTARY,
        ),
        Fault(
            "a suffix goes on after its earliest occurrence",
            "tree/suffix.py",
            "            self._next[key] = len(self.tokens)\n",
            "            self._next.setdefault(key, len(self.tokens))\n",
            INDEX,
        ),
        Fault(
            "pauses become four times as long",
            "tree/experience.py",
            "_GROWTH, _GROWTH_IF_USELESS = 2, 4",
            "_GROWTH, _GROWTH_IF_USELESS = 4, 4",
            PAUSES,
        ),
        Fault(
            "a useless draft is tried as often as another",
            "tree/experience.py",
            "_GROWTH, _GROWTH_IF_USELESS = 2, 4",
            "_GROWTH, _GROWTH_IF_USELESS = 2, 2",
            PAUSES,
        ),
        Fault(
            "rows that end leave a batch whose prompts are unread",
            "drafting/drafter.py",
            "        self.read_prompt()\n        self._slots.keep_rows",
            "        self._slots.keep_rows",
            "tests/test_paused_drafting.py",
        ),
        Fault(
            "a chat forgets a prompt that was put off",
            "decoding/loop.py",
            "        _read_prompt(call)\n        call.drafter.feed_pending",
            "        call.drafter.feed_pending",
            "tests/test_paused_drafting.py",
        ),
        Fault(
            "the longest pause is four times as long",
            "tree/experience.py",
            "_LONGEST_PAUSE = 16, 512",
            "_LONGEST_PAUSE = 16, 2048",
            PAUSES,
        ),
        Fault(
            "callbacks are dropped, so that no run stops early",
            "training/trainer.py",
            "            **kwargs,\n        )\n        if model.own_head",
            '            **{**kwargs, "callbacks": None},\n        )\n        if model.own_head',
            "tests/test_trainer.py -k best_checkpoint",
        ),
        Fault(
            "the provenance of the best weights tells the last step",
            "training/trainer.py",
            "self.state.global_step if self._best_step is None else self._best_step",
            "self.state.global_step",
            "tests/test_trainer.py -k best_checkpoint",
        ),
        Fault(
            "the provenance of the best weights tells the last metrics",
            "training/trainer.py",
            '        self._metrics |= best.get("metrics", {})\n',
            "",
            "tests/test_trainer.py -k best_checkpoint",
        ),
    ],
    "threads": [
        Fault(
            "a nested forward with another cache is taken for the call's own",
            "target/observation.py",
            "(self.cache is None or inputs.get(CACHE_NAME) is self.cache)",
            "True",
            f"{THREADS} -k nested",
        ),
        Fault(
            "a nested forward is observed with the one around it",
            "target/observation.py",
            "with _set(_running, None), substituted(None), along_tree(None):",
            "with substituted(None), along_tree(None):",
            f"{THREADS} -k nested",
        ),
        Fault(
            "the first call to end removes the stand-in of the others",
            "target/stand_in.py",
            "if not stand_in.num_users and attributes",
            "if attributes",
            THREADS,
        ),
        Fault(
            "a stand-in within other code serves a call twice",
            "target/stand_in.py",
            "torch.compiler.is_dynamo_compiling() or not self.num_users",
            "torch.compiler.is_dynamo_compiling()",
            THREADS,
        ),
        Fault(
            "a compilation in one thread switches the stand-ins of all threads off",
            "target/stand_in.py",
            "torch.compiler.is_dynamo_compiling() or",
            "torch.compiler.is_compiling() or",
            f"{THREADS} -k switch",
        ),
        Fault(
            "other threads notice a compilation of ours",
            "compiled/compile.py",
            "torch.compiler._is_compiling_flag = False",
            "pass",
            f"{THREADS} -k noticed",
        ),
        Fault(
            "a copied target keeps the stand-in of the call",
            "target/stand_in.py",
            "        return getattr, (self.module, self.name)\n",
            "        return object.__reduce_ex__(self, 2)\n",
            f"{THREADS} -k copy",
        ),
        Fault(
            "the substitute reaches the layers of other models",
            "attention/substitution.py",
            'substitution is not None and getattr(module, "config", None) is substitution.config',
            "substitution is not None",
            f"{THREADS} -k Attention",
        ),
        Fault(
            "the first call to end puts the draft back in training mode",
            "draft/evaluation_mode.py",
            "            if not mode.num_calls:\n                for",
            "            if True:\n                for",
            f"{THREADS} -k evaluation",
        ),
        Fault(
            "a measurement lands in the range of another call",
            "tree/policy.py",
            "            self.experience.enter_context(self._num_slots)\n            yield",
            "            yield",
            f"{THREADS} -k range",
        ),
    ],
    "further ones": [
        Fault(
            "device rounds forget the tokens that are ahead",
            "decoding/device_rounds.py",
            "self.running.context.num_slots + ahead + self._num_slots <=",
            "self.running.context.num_slots + self._num_slots <=",
            COMPILED,
        ),
        Fault(
            "device rounds forget the target's own slots",
            "decoding/device_rounds.py",
            "self.running.context.num_slots + ahead + self._num_slots <=",
            "self.running.context.num_slots + ahead <=",
            COMPILED,
        ),
        Fault(
            "device rounds forget the draft's own slots",
            "decoding/device_rounds.py",
            "self._draft_context.num_slots + self._count + ahead + self.drafter.num_slots <=",
            "self._draft_context.num_slots + self._count + ahead <=",
            COMPILED,
        ),
        Fault(
            "device rounds forget positions of the tree",
            "decoding/device_rounds.py",
            "last_position + self.drafter.num_positions <= len",
            "last_position <= len",
            LATE,
        ),
        Fault(
            "a product in place has no cap of logits",
            "drafting/head.py",
            "is_product = self._rows[1] is None and not self._is_capped",
            "is_product = self._rows[1] is None",
            HEAD,
        ),
        Fault(
            "the compiled head has no cap of logits",
            "drafting/head.py",
            "        self._head = self.target.head\n",
            "        self._head = self.target.head_module\n",
            HEAD,
        ),
        Fault(
            "compiled log-probabilities in half precision",
            "drafting/head.py",
            "        if logits.dtype in _HALF:\n            logits = logits.float()\n        best",
            "        best",
            HEAD,
        ),
        Fault(
            "rows that have ended do not count for the cut",
            "kv/transaction.py",
            "lengths = [*self.context.lengths, *(row.length for row in self._stored.values())]",
            "lengths = [*self.context.lengths]",
            INTERRUPTED,
        ),
        Fault(
            "rows that have ended do not come back",
            "kv/transaction.py",
            "        self.restore_rows()\n        if returns",
            "        if returns",
            INTERRUPTED,
        ),
        Fault(
            "a failed check leaves the prompt in the cache",
            "kv/transaction.py",
            "returns=isinstance(error, MSDUnsupportedError)",
            "returns=False",
            "tests/test_odd_calls.py -k fails_its_check",
        ),
        Fault(
            "a refused call takes the memory of a chat",
            "decoding/call.py",
            "    check_positions(adapter.text_config",
            "    ChatMemory(cache, draft, input_ids, num_slots)\n    check_positions(adapter.text_config",
            "tests/test_odd_calls.py -k refused_call",
        ),
        Fault(
            "a cycle of references keeps the target",
            "drafting/head.py",
            "        self._product: TensorFunction | None = None",
            "        self._cycle = self.logits\n        self._product: TensorFunction | None = None",
            "tests/test_pair_state.py -k goes_with",
        ),
        Fault(
            "release does not free buffers",
            "decoding/pair.py",
            "        drafts.pop(model, None)\n",
            "        pass\n",
            "tests/test_pair_state.py -k release",
        ),
        Fault(
            "a pause stays long after drafting has paid",
            "tree/experience.py",
            "            self._pause = _PAUSE\n            return True",
            "            return True",
            PAUSES,
        ),
    ],
    "recurrent": [
        Fault(
            "a branch decays another",
            "recurrent/gated_delta.py",
            "return torch.where(ancestors, decays - decays.mT, -torch.inf).exp()",
            "return (decays - decays.mT).exp().tril()",
            KERNELS,
        ),
        Fault(
            "the root follows itself in a convolution",
            "recurrent/nodes.py",
            "    previous[:, num_columns] = num_columns - 1  # the root is its own parent\n",
            "",
            KERNELS,
        ),
        Fault(
            "steps of Mamba 2 are clamped as in a prompt",
            "recurrent/kernels.py",
            "    dt = _step_sizes(dt, dt_bias, dt_softplus)\n    _, ancestors",
            "    dt = _step_sizes(dt, dt_bias, dt_softplus).clamp(*kwargs['dt_limit'])\n    _, ancestors",
            KERNELS,
        ),
        Fault(
            "Mamba 1 starts from nothing",
            "recurrent/kernels.py",
            "        state.float(),\n        parents,",
            "        torch.zeros_like(state.float()),\n        parents,",
            KERNELS,
        ),
        Fault(
            "a row that accepts nothing loses its state",
            "recurrent/gated_delta.py",
            "end = torch.where(accepted[:, :, :1], decays.gather(2, last), 0)",
            "end = decays.gather(2, last)",
            KERNELS,
        ),
        Fault(
            "a step of plain decoding changes the state itself",
            "recurrent/layer.py",
            "self.conv_states, self.recurrent_states = _copies(self.conv_states), _copies(self.recurrent_states)",
            "self.conv_states, self.recurrent_states = dict(self.conv_states), dict(self.recurrent_states)",
            STATES,
        ),
        Fault(
            "an interrupted commit is half done",
            "kv/transaction.py",
            "            if is_committed:\n                layer.settle()",
            "            if True:\n                layer.settle()",
            STATES,
        ),
        Fault(
            "ragged rows keep the states of longer texts",
            "kv/transaction.py",
            "(min(lengths) != max(lengths) or lengths == self._first.lengths)",
            "lengths == self._first.lengths",
            STATES,
        ),
        Fault(
            "an unknown convolution counts in trees",
            "recurrent/layer.py",
            " and not nodes.are_chains:",
            " and False:",
            STATES,
        ),
        Fault(
            "trees of one thread are seen by all",
            "recurrent/kernels.py",
            '_current: ContextVar[TreeNodes | None] = ContextVar("msd_hf.tree_nodes", default=None)',
            '_current = type("Shared", (), {"get": lambda self: getattr(self, "v", None), "set": lambda self, v: '
            'setattr(self, "v", v), "reset": lambda self, token: setattr(self, "v", None)})()',
            f"{FAMILIES} -k threads",
        ),
    ],
    "unusual": [
        Fault(
            "mixers do not run again over the accepted tokens",
            "recurrent/layer.py",
            "                if count:\n                    self._call.repeat(count)",
            "",
            UNUSUAL,
        ),
        Fault(
            "mixers run again from the states behind the chain",
            "recurrent/layer.py",
            "(_copies(states) for states in self._before)",
            "(_copies(states) for states in (self.conv_states, self.recurrent_states))",
            UNUSUAL,
        ),
        Fault(
            "a window that spares the prompt spares nothing",
            "attention/masks.py",
            "        if reach.spares_prompt:",
            "        if False:",
            UNUSUAL,
        ),
        Fault(
            "keys of other branches count in the choice of blocks",
            "attention/block_selection.py",
            "is_seen = nodes.visible.to(scores.device) & (",
            "is_seen = (",
            UNUSUAL,
        ),
        Fault(
            "blocks are made of slots, not of places",
            "attention/block_selection.py",
            "(self.places.to(device) // block_size)",
            "(torch.arange(self.places.shape[1]).expand_as(self.places).clamp(max=self.length - 1) // block_size)",
            UNUSUAL,
        ),
        Fault(
            "inputs of every forward stay when rows end",
            "kv/slots.py",
            "inputs = {name: value[list(rows)] for name, value in self.inputs.items()}",
            "inputs = self.inputs",
            UNUSUAL,
        ),
    ],
    "EAGLE-3 drafts": [
        Fault(
            "the wrong hidden states are read",
            "draft/eagle3/modeling.py",
            "TargetReads(tuple(sorted(number - 1 for number in chosen))",
            "TargetReads(tuple(sorted(min(number, num_layers - 1) for number in chosen))",
            EAGLE3_GENERATE,
        ),
        Fault(
            "the input of the first layer is its output",
            "target/observation.py",
            "            if layer == EMBEDDINGS:\n                states = args",
            "            if False:\n                states = args",
            EAGLE3_GENERATE,
        ),
        Fault(
            "the norm before the residual is ignored",
            "draft/eagle3/modeling.py",
            "residual = normed if config.norm_before_residual else hidden_states",
            "residual = hidden_states",
            EAGLE3_GOLDEN,
        ),
        Fault(
            "short steps leave out the norms of queries and keys",
            "draft/plain_forward.py",
            "queries, keys = layer.query_norm(queries), layer.key_norm(keys)",
            "pass",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "short steps leave out the final norm",
            "draft/plain_forward.py",
            "        if self.norm is not None:\n            states = self.norm(states)\n",
            "",
            EAGLE3_GOLDEN,
        ),
        Fault(
            "the head reads states before the norm",
            "drafting/head.py",
            "                states = self._norm(states)\n",
            "                pass\n",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "rows of the head are taken for tokens",
            "drafting/head.py",
            "if draft.draft_vocab is not None and (self._rows is not None or own_head is not None):",
            "if draft.draft_vocab is not None and self._rows is not None:",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "the draft's own embedding is not read",
            "drafting/embedding.py",
            "    own: Any = draft.own_embedding\n",
            "    own: Any = None\n",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "placeholders are images",
            "drafting/embedding.py",
            'is_placeholder = draft.visual_positions == "placeholder"',
            "is_placeholder = False",
            EAGLE3_GOLDEN,
        ),
        Fault(
            "a mean over an image takes padding in",
            "drafting/drafter.py",
            "runs = visual_mask if prompt_mask is None else",
            "runs = visual_mask if True else",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "dropped rows are read",
            "drafting/visual_rows.py",
            '    if policy == "dropped":\n        most = 0\n',
            "    if False:\n        most = 0\n",
            EAGLE3_REFERENCE,
        ),
        Fault(
            "ids of outputs are those of hidden states",
            "draft/eagle3/conventions.py",
            "[number + 1 for number in ids]",
            "list(ids)",
            EAGLE3_LOADING,
        ),
        Fault(
            "a saved draft has the names of its checkpoint",
            "draft/base.py",
            "[kept for kept in conversions if not isinstance(kept, WeightRenaming)]",
            "conversions",
            EAGLE3_LOADING,
        ),
        Fault(
            "a map beyond the vocabulary is taken",
            "draft/eagle3/modeling.py",
            " or int(tokens.max()) >= self.config.vocab_size",
            "",
            EAGLE3_LOADING,
        ),
    ],
}

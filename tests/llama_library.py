"""The part of llama.cpp's interface that is used, on a transformers model: one cache of all sequences, a flat batch."""

import ctypes
from types import SimpleNamespace

import torch
from transformers import DynamicCache


class Library:
    """Stands for `llama_cpp.llama_cpp` and ggml: calls back for the output of each layer, as llama.cpp does."""

    llama_model_is_hybrid = llama_model_is_recurrent = staticmethod(lambda _: False)
    llama_free = llama_model_free = llama_batch_free = staticmethod(lambda _: None)
    ggml_backend_sched_eval_callback = staticmethod(lambda function: function)
    llama_get_memory = llama_model_get_vocab = staticmethod(lambda context: context)
    llama_model_default_params = llama_context_default_params = SimpleNamespace

    def __init__(self, llm, name="l_out"):
        self._llm, self._name, config = llm, name, llm.config
        self.cache, self.cells = DynamicCache(config=config), []  # of each cell its place and sequences
        self.calls, self.code = [], 0
        for function, value in {
            "n_layer": config.num_hidden_layers,
            "n_embd": config.hidden_size,
            "n_ctx_train": config.max_position_embeddings,
            "n_head": config.num_attention_heads,
            "n_head_kv": config.num_key_value_heads,
            "load_from_file": 1,
        }.items():
            setattr(self, f"llama_model_{function}", lambda *_, value=value: value)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.metadata = {
            b"general.architecture": b"llama",
            **{b"llama.attention.%s_length" % side: b"%d" % head for side in (b"key", b"value")},
        }
        self.llama_vocab_n_tokens = lambda _: config.vocab_size

    def llama_model_meta_val_str(self, _, name, buffer, size):
        buffer.value = self.metadata.get(name, b"")
        return len(buffer.value) if name in self.metadata else -1

    def llama_init_from_model(self, _, given):
        self.given = given
        return 1

    def llama_batch_init(self, tokens, *_):
        return SimpleNamespace(
            n_tokens=0,
            token=[0] * tokens,
            pos=[0] * tokens,
            n_seq_id=[0] * tokens,
            seq_id=[[0] for _ in range(tokens)],
            logits=[0] * tokens,
        )

    def llama_memory_seq_cp(self, _, source, target, first, end):
        for place, sequences in self.cells:
            if source in sequences and first <= place < end:
                sequences.add(target)

    def llama_memory_seq_rm(self, _, sequence, *__):
        for _, sequences in self.cells:
            sequences.discard(sequence)

    @torch.no_grad()
    def llama_decode(self, _, batch):
        count = batch.n_tokens
        if self.code:
            return self.code
        assert 0 < count <= self.given.n_ubatch
        own = [(batch.pos[row], {batch.seq_id[row][0]}) for row in range(count)]
        assert all(sequence < self.given.n_seq_max for _, (sequence,) in own)
        self.calls.append(count)
        self.cells += own
        assert sum(bool(sequences) for _, sequences in self.cells) <= self.given.n_ctx
        sees = [[place <= at and bool(mine & whose) for place, whose in self.cells] for at, mine in own]
        mask = torch.zeros(count, len(self.cells)).masked_fill(~torch.tensor(sees), torch.finfo(torch.float32).min)
        outputs = [row for row in range(count) if batch.logits[row]]
        layers = self._llm.model.layers
        self._goes_on = True

        def computed(number):
            def hook(_, __, output):
                rows = output[0, outputs].contiguous() if number == len(layers) - 1 else output[0]
                self._tensor, self._tensor_name = rows, f"{self._name}-{number}".encode()
                if self._goes_on and self.given.cb_eval(1, True, None):
                    self._goes_on = self.given.cb_eval(1, False, None)
                if number == len(layers) - 1:
                    output = output.clone()
                    output[0, outputs] = rows
                return output

            return hook

        handles = [layer.register_forward_hook(computed(number)) for number, layer in enumerate(layers)]
        logits = self._llm(
            input_ids=torch.tensor([batch.token[:count]]),
            position_ids=torch.tensor([[at for at, _ in own]]),
            attention_mask=mask[None, None],
            past_key_values=self.cache,
        ).logits[0]
        for handle in handles:
            handle.remove()
        self._logits = {row: logits[row].contiguous() for row in outputs}
        return 0 if self._goes_on else 2

    def llama_get_logits_ith(self, _, row):
        return ctypes.cast(self._logits[row].data_ptr(), ctypes.POINTER(ctypes.c_float))

    # ---- ggml ----

    def ggml_get_name(self, _):
        return self._tensor_name

    def ggml_nelements(self, _):
        return self._tensor.numel()

    def ggml_nbytes(self, _):
        return 4 * self._tensor.numel()

    def ggml_backend_tensor_get(self, _, data, offset, size):
        ctypes.memmove(data, self._tensor.data_ptr() + offset, size)

    def ggml_backend_tensor_set(self, _, data, offset, size):
        ctypes.memmove(self._tensor.data_ptr() + offset, data, size)

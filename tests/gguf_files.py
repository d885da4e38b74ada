"""GGUF files of tiny LLMs, written tensor by tensor."""

import gguf
import torch


def write_gguf(llm, path):
    """Write a Llama, Qwen 2 or Gemma 3 model in float32, without a tokenizer."""
    config = llm.config
    kind = {"llama": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}[config.model_type]
    writer = gguf.GGUFWriter(path, kind)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("rope_theta") or rope["full_attention"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, weight in llm.state_dict().items():
        values = weight.detach().float()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if kind == "gemma3" and "norm" in name:
            values = values + 1
        if name == "lm_head.weight" and llm.get_output_embeddings().weight is llm.get_input_embeddings().weight:
            continue
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(llm, name, factor):
    """Multiply a weight of an LLM."""
    with torch.no_grad():
        llm.get_parameter(name).mul_(factor)
    return llm

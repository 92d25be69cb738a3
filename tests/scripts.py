"""The start of the scripts that tests run in processes of their own: a new tiny Llama under the default strategy."""

START = """
    import os, sys, time, torch, torch.distributed as dist, transformers
    from pathlib import Path
    from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, RunFolder, initialize_distributed

    def start(timeout_minutes=1):
        env = initialize_distributed("gloo", timeout_minutes=timeout_minutes)
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4
        )
        setup = DistributedSetup.build()
        runtime = setup.runtime(NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup))
        return env, runtime, runtime.optimizer(torch.optim.AdamW, lr=1e-3)

    def train(runtime, optimizer):
        tokens = torch.randint(3, 95, (2, 8))
        runtime.forward_backward({"input_ids": tokens, "labels": tokens})
        optimizer.step()
        optimizer.zero_grad()
"""

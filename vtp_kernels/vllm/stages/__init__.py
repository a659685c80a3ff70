"""Pruning between the layers inside of vLLM 0.32: FastV, PyramidDrop and their like.

    VLLM_PLUGINS=vtp_kernels vllm serve llava-hf/llava-1.5-7b-hf \\
        --additional-config '{"vtp": {"method": "fastv:2:0.5"}}' \\
        --scheduler-cls vtp_kernels.vllm.StagedScheduler \\
        --logits-processors vtp_kernels.vllm:StagedRequests --no-enable-chunked-prefill \\
        --compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}'

The layers from a decision on are a stage. A stage has KV cache groups of its own, whose blocks hold
only the rows that stayed, one behind the other. How many these are is known when a request comes
in, so blocks, slots and lengths are ready before anything runs; which ones is chosen on the device.

Where a method's counts depend on the picture, blocks are for as many as may stay, and lengths and
slots of a stage are made anew in the step that reads the prompt, once the method has decided.

settings      what is asked for, and whether it can be had
accounting    how many rows each request has in each stage, and what a step does
cache         blocks for the rows that stay (engine core)
requests      what a request may not ask for (front end)
scheduler     tells the cache of them, and reads a prompt with images in one step (engine core)
attention     lengths and slots of a stage's layers (workers)
state         tells the attention of the requests in a step (workers)
choice        which rows stay (workers)
passage       a step's rows through the layers (workers)
model         asks for all of this, if a method is given (workers)
ground        all that is taken for granted of vLLM's inner parts

settings, accounting and choice know nothing of vLLM.
"""

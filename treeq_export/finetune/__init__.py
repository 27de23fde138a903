"""The finetune stage: train a calibrated plan's branches, scales and biases (and QAT's weights).

TreeQ publishes that a plan is finetuned "PEFT, QLoRA-like"; what is trained, on what and against
what is ours. The model teaches its own quantized copy along trajectories that both walk: no data
set is needed (pool.py). The weight codes stay frozen unless mode is "qat".
"""

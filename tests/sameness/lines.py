"""What record.py does: commands, a line each, and the data that they are given.

Words in braces stand for what `Recorder.fill` knows: {multi_lora} for a setting's name in the checkout, {little} for
the settings of a small run. A line is also the name of what came of it, the same in recordings of two checkouts.
"""

# What a checkout may call a setting or a command: in lines below {multi_lora} is the first of these that it knows.
SETTINGS = {
    "multi_lora": ("multi_lora", "pack"),
    "plan_only": ("plan_only", "prepare_only", "scaffold"),
    "over_budget": ("allow_over_budget", "approved"),
    "rerun": ("rerun_existing", "force"),
    "approval": ("dataset.sensitive_data_approval", "dataset.approval", "dataset.permission"),
}
COMMANDS = {
    "data preview": ("data preview",),
    "data convert": ("data convert",),
    "status": ("status",),
    "logs": ("logs",),
    "cancel": ("cancel",),
    "resume": ("resume",),
    "table": ("table",),
    "report": ("report",),
    "evaluate": ("evaluate",),
    "subgroups": ("subgroups", "heterogeneity"),
    "reproduce": ("reproduce",),
    "compare": ("compare",),
    "embed": ("embed",),
    "export": ("export",),
    "archive": ("archive",),
    "doctor": ("doctor",),
}
# Parts of lines.
PARTS = {
    "run": "alone/rank=4,lr=0.01",
    "sweep": "alone",
    "model": "model=hf_llama model.path=llama",
    "machine": "device=cpu dtype=fp32 threads=1",
    "little": "{model} {machine} dataset.max_samples=16 dataset.max_validation_samples=20 num_warmup_steps=0 eval.limit=9 "
    "report=false",
    "long": "{little} epochs=20 epochs_to_save=last eval.limit=5",
    "unequal": "{little} lora.rank=2,8 lora.use_dora=false,true lora.dropout=0,0.2 lr=1e-2 gradient_accumulation_steps=2 "
    "batch_size=3 clip_grad_norm=1 custom_metrics=[my_metrics.token_accuracy] enable_activation_checkpointing=true "
    "eval=none",
    "own": "{model} {machine} lr=1e-2 num_warmup_steps=1 lora.rank=4 report=false",
    "one_job": "{little} slurm=cluster slurm.gpus=0 'slurm.setup=[\"echo ready\"]' slurm.srun_args=[--quiet]",
}

# Folder -> what is trained there. {multi_lora}=off trains one run after another, a number so many on one base model.
SWEEPS = {
    "alone": "-m {little} lora.rank=4,8 lr=1e-2,2e-3 epochs=2 {multi_lora}=off",
    "shared": "-m {little} lora.rank=4,8 lr=1e-2,2e-3 epochs=2 {multi_lora}=3",
    "unequal_alone": "-m {unequal} {multi_lora}=off",
    "unequal_shared": "-m {unequal} {multi_lora}=4",
    "seeds": "-m {little} lora.rank=4,8 seed=1,2,3 lr=1e-2 epochs=4 report=true {multi_lora}=6",
    "failing": "-m {little} lr=1e-2,1e30,2e-3 epochs=2 {multi_lora}=3",
    "measured": "-m {little} lr=1e-2,2e-3,1e-3 epochs=12 eval=none {multi_lora}=auto",
    "whole": "-m {long} lora.rank=4,8,16 {multi_lora}=off",
}
# The sweep `whole`, stopped by SIGTERM when some steps are made, then resumed.
INTERRUPTED = {
    "stopped_alone": "-m {long} lora.rank=4,8,16 {multi_lora}=off",
    "stopped_shared": "-m {long} lora.rank=4,8,16 {multi_lora}=2",
}
SINGLES = {
    "risk": "{own} dataset=files dataset.path=risk.csv dataset.unit_column=who eval=risk eval.logprobs=true epochs=3 "
    "eval.epochs=all run_val_every_n_steps=3 log_every_n_steps=2 trackers=[tensorboard]",
    "conversations": "{own} dataset=files dataset.path=chats dataset.packed=true dataset.max_seq_len=256 batch_size=2 "
    "epochs=2 lr_scheduler=linear epochs_to_save=[1] save_merged=true",
    "numbers": "{own} model.kind=base dataset=files dataset.path=numbers.jsonl eval=number dtype=bf16 epochs=2 "
    "lr_scheduler=constant weight_decay=0.1 lora.attn_modules=[q_proj,k_proj] lora.apply_to_mlp=false",
    "own_task": "{own} dataset.max_samples=24 'eval.tasks=[match,my_tasks.py@sums]' eval.limit=4 shuffle=false "
    "group_by_length=false max_steps_per_epoch=2 dataset.sample_seed=3 run_name=mine",
    "two_processes": "{own} dataset.max_samples=30 gpus=2 batch_size=4 epochs=2 eval.limit=5 lora.dropout=0.1",
    "red": "{own} dataset=files dataset.path=red/risk.csv eval=risk dataset.group_columns=[sex]",
}

# Of which the recipe gets what: --cfg job --resolve --package torchtune.
CONFIGS = r"""
model=smollm2_360m lora.rank=8 lora.alpha=4 lora.dropout=0.05
model=llama3_2_1b_instruct lora.use_dora=true lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]
model=llama3_3_70b_instruct slurm=cluster slurm.gpus=4 lora.quantize_base=true
model=llama3_1_8b lora.apply_to_mlp=false compile=true
model=qwen2_5_0_5b_instruct dataset.packed=true dataset.max_seq_len=512
model=qwen2_5_7b enable_activation_checkpointing=true enable_activation_offloading=true
model=mistral_7b_instruct lora.apply_to_output=true epochs_to_save=[0,2] epochs=3 save_merged=true
{model} lr_scheduler=linear num_warmup_steps=7 clip_grad_norm=1.5 weight_decay=0
{model} lr_scheduler=constant dataset=files dataset.path=risk.csv dataset.column_map.input=question eval=risk
{model} dataset=census eval=fitting dataset.arguments.target=continuous
{model} dataset=model_organisms trackers=[tensorboard,wandb] custom_metrics=[my_metrics.token_accuracy]
{model} dataset=synthetic_twins dataset.system_prompt=Hello dataset.train_on_input=true
{model} dataset=bit_sequences run_val_every_n_steps=5 log_every_n_steps=3 checkpoint_every_n_steps=9
{model} '+torchtune.optimizer.betas=[0.9,0.95]' torchtune.optimizer.fused=false '~torchtune.lr_scheduler'
{model} device=cuda dtype=bf16 threads=3 gpus=2 shuffle=false group_by_length=false seed=7
""".strip().splitlines()

# And everything that a configuration has: --cfg job --resolve.
WHOLE_CONFIGS = r"""
{model} run_name=x
model=llama3_1_8b slurm=cluster run_name=x
{model} slurm=site_example eval=numeric_risk dataset=predictable_or_not run_name=x
{model} {multi_lora}=4 {rerun}=true {plan_only}=true {over_budget}=true max_gpu_hours=2 run_name=x
{model} {multi_lora}=off {approval}=me run_name=x
""".strip().splitlines()

# What train refuses. On the tiny model with garbage for weights, unless the line chooses one.
TRAIN_MISTAKES = r"""
lora.rnk=8
lrr=1
modle=x
rank=8
slurm.colour=red
slurm.time=soon
slurm.time=7200
slurm.mem=lots
slurm.gpus=-1
slurm.max_parallel=0
dataset.column_map.inputs=x
torchtune.optimzer.lr=1
+lora.rnk=8
++lora.rnk=8
+lrr=8
+torchtune.optimzer={lr:1}
+dataset.arguments.wordlength=5
eval=nome
lora=big
model=smolm2_135m
hydra/launcher=nope
lora=8
lora.rank=abc
epochs=1.5
epochs=null
lr=fast
shuffle=maybe
slurm.gpus=two
lora.attn_modules=q_proj
epochs_to_save=[a]
lora.rank=0
lora.alpha=0
lora.dropout=1
lora.attn_modules=[] lora.apply_to_mlp=false
model.date=monday
lora.attn_modules=[q]
lr=0
lr=nan
seed=4294967296
weight_decay=inf
clip_grad_norm=0
lr_scheduler=nope
dtype=fp8
device=tpu
epochs_to_save=[5]
epochs_to_save=some
run_name=a/b
lora.rank='${nope}'
lora.rank='${lora.rnk}'
model=hf_llama model.path=???
dataset=json
{multi_lora}=1
{multi_lora}=many
{multi_lora}=2.5
{multi_lora}s=2
{plan_only}=maybe
{over_budget}=maybe
{rerun}=maybe
trackers=[tensorbord]
eval.limit=0
eval.epochs=[3]
eval.epochs=some
experiment.name=a/b
experiment=capitalization
experiment=data_size
+torchtune.foo=1
torchtune.epochs=3
torchtune.model.lora_rank=4
~torchtune.profiler
torchtune.loss=null
~torchtune.optimizer.lr
torchtune.save_adapter_weights_only=false
+torchtune.optimizer.bogus=1
+torchtune.optimizer.betas=[2,3]
+torchtune.lr_scheduler.num_training_steps=3
model.model_type=LLAMA9
num_warmup_steps=5000
dataset.train_split=trian
dataset.validation_split=dev
eval.tasks=[capitalisation]
eval.tasks=[my_tasks.py]
eval.tasks=[my_tasks.py@sum]
eval.tasks=[my_tasks.py@sums] eval.task_args.most=3
eval.tasks=[none.py@sums]
eval.tasks=[nowhere/sums]
eval.max_tokens=500
slurm=cluster device=cuda
objective=acuracy
objective=accuracy eval=none
lora.quantize_base=true device=cpu
lora.apply_to_output=true
model.path=/nowhere
model=llama3_2_1b_instruct
model.kind=base dataset.type=chat
dataset.type=text
device=cuda
custom_metrics=[my_metrics.gone]
custom_metrics=[my_metrics.breaks]
slurm.gpus=2 gpus=4 slurm=cluster
dataset=json dataset.path=/nowhere.json
dataset=files dataset.path=broken.json
dataset=files dataset.path=empty.csv
dataset=files dataset.path=no_input.csv
dataset=files dataset.path=ragged.csv
dataset=files dataset.path=bad.jsonl
dataset=files dataset.path=blank.jsonl
dataset=files dataset.path=leaky.csv
dataset=files dataset.path=rows.dat
dataset=files dataset.path=units.csv dataset.unit_column=who
dataset=files dataset.path=risk.csv dataset.unit_column=x
dataset=files dataset.path=chat_bad
dataset=files dataset.path=two_kinds
dataset=files dataset.path=numbers.jsonl eval=risk
eval=number
dataset=files dataset.path=risk.csv 'dataset.prompt={age}'
dataset=files dataset.path=risk.csv dataset.prompt=same
dataset=files dataset.path=yellow/risk.csv agent=true
dataset=files dataset.path=red/risk.csv agent=true eval=risk eval.keep_samples=true
lora.rank=[1
lora.rank
lora.rank = 8
lora.rank=8,16
-m lora.rank=8, 16
dataset.prompt=Say:{input}!
--lr 1e-4
--batch-size=4
--bogus
--cfg jobb
-m --cfg job
--cfg job +lora.rnk=8
--confg-dir x
-m lora.rank=8,0
lora.rank=8,0 -m lr=1e-3
-m lora.rank=8,16 torchtune.seed=1 dry_run=true
-m lora.rank=8,16 lora.rnk=3
-m num_warmup_steps=5,5000
-m lora.rank='choice()'
-m 'lr=interval(1e-4,1e-3)'
-m lora.rank=4,8 hydra.sweeper.paired=[lora.rank,lr]
-m lora.rank=4,8 lr=1,2,3 hydra.sweeper.paired=[lora.rank,lr]
-m hydra.sweeper.runs=[8]
-m hydra.sweeper.runs=3
-m experiment=capitalization_rank_lr,data_size
-m hydra/sweeper=optuna 'lr=interval(1e-4,1e-3)' hydra.sweeper.direction=maximize
-m seed=1,2 max_gpu_hours=0 slurm=cluster
slurm=cluster
--config-dir mine dataset=typo
--config-dir mine dataset=type
--config-dir mine dataset=syntax
--config-dir mine dataset=list
--config-dir mine dataset=misplaced
--config-dir mine dataset=root
--config-dir mine dataset=empty
--config-dir mine model=typo
--config-dir mine model=extra model.path=llama
--config-dir mine model=base
--config-dir nowhere
'hydra.run.dir="alone/rank=4,lr=0.01"'
""".strip().splitlines()

# What the other commands refuse.
MISTAKES = r"""
tabel out
data prevew
data
quux
-m lr=1
lr=1
data preview lora.rnk=3
data preview --row 3
data preview {model} dataset=files dataset.path=none.csv
data preview {model} dataset=files dataset.path=empty.csv
data preview {model} dataset=files dataset.path=risk.csv --split tset
data convert
data convert none.csv out
data convert risk.csv alone
data convert risk.csv out --to xml
data convert broken.json out
data convert empty.csv out
data convert yellow/risk.csv out --agent
status
status nowhere
status alon
status empty
status --wach empty
logs empty
logs {sweep}
logs {run}
logs {sweep} rank=3,lr=0.01
cancel empty
cancel {sweep}
cancel nowhere --yes
cancel {sweep} rnk=4
resume
resume empty
resume empty slurm.tme=1
resume {sweep} lr=1
table
table nowhere
table empty
table broken_run
table old_run
report
report nowhere
report empty
report {sweep} --metods
evaluate
evaluate nowhere
evaluate epmty
evaluate empty eval.limit=3
evaluate {sweep} eval.limt=3
evaluate {sweep} lr=3
evaluate {sweep} eval=matsch
evaluate {sweep} eval=none
evaluate {sweep} eval.limit=few
evaluate {sweep} eval=match eval.epochs=[7]
evaluate {sweep} eval.tasks=[my_tasks.py@sum]
evaluate {sweep} eval=match eval.max_tokens=100000
evaluate {run} eval=match device=cuda
evaluate {sweep} empty
evaluate {run}/epoch_1 eval=match lora.rank=3
evaluate no_weights eval=match
evaluate {run} eval.limit=3
subgroups
subgroups nowhere
subgroups groups.csv --group SEX
subgroups groups.csv --unit whom
subgroups one_group.csv
subgroups bad_groups.csv
subgroups no_group.csv
subgroups {run}
subgroups {sweep}
reproduce
reproduce nowhere
reproduce {sweep}
reproduce {run} --to {sweep}
reproduce empty
compare
compare llama
compare nowhere
compare llama llama llama
compare {run} other_model
compare {run} --epoch 7
compare {run} --batch-size 0
compare {run} --text ' '
embed {run}
embed {run} --to x.parquet --layers 5
embed {run} --to x.parquet --layers a
embed {run} --to x.parquet --epoch 2
embed {run} --to x.parquet --layers -1,4
embed {run} --to x.parquet lr=1
embed {run} --to x.parquet --split tset
embed {run} --to x.parquet --text ' '
embed {run} --to x.parquet --file none.txt
embed {run} --to x.npz --text a
embed {run} --to x.parquet --text a --split test
embed {run} --to x.parquet --pooling max
embed nowhere --to x.h5
embed lr=1 --to x.h5
embed {run} --to groups.csv
export {run}
export nowhere --to y
export {sweep} --to y
export {run} --to y --epoch 7
export {run} --to y --epoch no
export {run} --to empty
export empty --to y
export {run}/epoch_0 --to y
export gone_base --merged --to y
archive
archive nowhere
archive empty
archive {sweep}
archive {sweep} --to {sweep}/kept --yes
archive {sweep} --to mine --yes
archive {sweep} --data
archive {sweep} --keep some
archive stopped_early --yes
doctor
doctor nowhere
doctor --gpus 2
doctor --jb
""".strip().splitlines()

# What train does besides training.
TRAIN_DOINGS = r"""
{own} dry_run=true run_name=x
-m {little} lora.rank=4,8 lr=1e-2,1e-3 dry_run=true {multi_lora}=off
-m {little} lr=1e-2,1e-3 compile=false,true {multi_lora}=4 dry_run=true --json
-m {little} lr=1e-2,1e-3 gpus=1,2 {multi_lora}=auto dry_run=true --json
-m {little} lora.rank=4,8 lr=1e-2,2e-3 epochs=2 {multi_lora}=off hydra.sweep.dir=alone
-m {little} lora.rank=2,4 {plan_only}=true {multi_lora}=2 hydra.sweep.dir=planned
-m {little} lora.rank=2,4 {plan_only}=true hydra.sweep.dir=planned_too --json
{own} dataset=files dataset.path=yellow/risk.csv eval=risk agent=true '{approval}="Ann, today"' dry_run=true run_name=x
-m {model} experiment=capitalization_rank_lr dry_run=true --json
--cfg job --package experiment experiment=data_size
--cfg=job --package=lr lr=3e-5 --json
--info searchpath
-sc query=nope
""".strip().splitlines()

# What the commands do with runs that are done. In this order: some need what another made.
DOINGS = r"""
--version
--help --json
data --help
data preview {model} dataset=files dataset.path=risk.csv --rows 2
data preview {model} dataset.max_samples=9
data preview {model} dataset=files dataset.path=chats --json
data preview {model} dataset=files dataset.path=leaky.csv --json
data preview {model} dataset=files dataset.path=red/risk.csv
data convert risk.csv as_parquet
data convert chats as_json --to json --json
data convert red/risk.csv as_red
status alone
status alone --json
status failing
status failing --watch --json
status planned
table alone
table alone --json
table shared
table seeds
table seeds --json
table failing
table risk
table unequal_shared
table .
cancel alone
cancel alone --json
report alone --to page
report alone --methods
report seeds --json
report risk --to risk_page
report failing --methods
evaluate later dry_run=true eval.epochs=all eval.limit=9
evaluate later eval.epochs=all eval.limit=9 --json
evaluate later eval=match eval.limit=6 eval.logprobs=true
evaluate later eval=match eval.limit=6 eval.logprobs=true
evaluate later/rank=4,lr=0.01 'eval.tasks=[my_tasks.py@sums]' eval.limit=3
evaluate later eval=match eval.limit=3
evaluate later eval=match eval.limit=3 {rerun}=true
evaluate {model} device=cpu dtype=fp32 threads=1 eval=match eval.limit=4
evaluate {run}/epoch_1 device=cpu dtype=fp32 threads=1 eval=match eval.limit=4
subgroups groups.csv
subgroups groups.csv --group GROUP --json
subgroups risk --json
subgroups red
reproduce {run} --check
reproduce {run} --to again
reproduce {run} --to again2 --json
reproduce shared/rank=8,lr=0.01 --to again3 --json
compare {run} --max-samples 6
compare {run} shared/rank=4,lr=0.01 --text abc --json
compare {run} llama --text abc --text defg --json
embed {run} --text one --text 'two words' --to e.parquet --layers 0,2,-1 --json
embed {run} --split test --max-samples 3 --to f.parquet --pooling none --logits
embed llama --text one --to g.h5 --top 3
export {run} --to adapter
export {run} --to earlier --epoch 0 --json
export {run} --to merged --merged --json
archive alone --dry-run
archive alone --to kept --json
archive to_archive --to kept --yes --data
archive shared --keep none --dry-run --json
resume planned --json
resume failing
resume alone
status planned --json
""".strip().splitlines()

# What is done on a cluster, in this order; `job N TASK` is for record.run_job.
CLUSTER = r"""
train -m {little} slurm=cluster lora.rank=2,4 {multi_lora}=off dry_run=true
train -m {little} slurm=cluster lora.rank=2,4 {multi_lora}=2 dry_run=true --json
train -m {little} slurm=cluster lora.rank=2,4 {multi_lora}=off slurm.max_parallel=1 hydra.sweep.dir=jobs
train -m {little} slurm=cluster lora.rank=2,4,8 {multi_lora}=2 hydra.sweep.dir=group_job --json
train {one_job} slurm.partition=cpu hydra.run.dir=one_job run_name=one epochs=12
train -m {little} slurm=cluster seed=1,2 slurm.partition=gpu slurm.time=3-00:00:00 hydra.sweep.dir=none
status jobs
status group_job --json
logs jobs rank=2
cancel jobs
resume jobs
job 0 0
job 0 1 ended
job 1 0
job 2 none stopped
job 2 none
status jobs
status group_job
status one_job --json
logs jobs rank=2
logs jobs rank=2 --json
table jobs
evaluate jobs eval=match eval.limit=3 dry_run=true
evaluate jobs eval=match eval.limit=3
job 3 none
table jobs
resume jobs --json
cancel jobs --yes --json
status jobs
doctor
doctor --json
""".strip().splitlines()

# Stands for SLURM's commands: writes down how it is called, accepts every job, starts none.
SLURM = """#!/bin/sh
name=${0##*/}
[ "$name" = srun ] || echo "$name $*" >> "${0%/*}/calls"
case "$name $*" in
    "sbatch --test-only"*) cat > /dev/null; echo "sbatch: Job 7 to start at 2026-01-31T12:00:00 on c1" >&2 ;;
    "sbatch --parsable"*)
        for path; do :; done
        echo "$path" >> "${0%/*}/submitted"
        echo 10$(grep -c . "${0%/*}/submitted") ;;
    "srun "*) while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done; exec "$@" ;;
    "scontrol show config") echo "MaxArraySize = 1001"; echo "SLURM_VERSION = 23.11.4"; echo "ClusterName = test" ;;
    "scontrol --oneliner show job"*) echo "JobId=101 JobState=RUNNING RunTime=00:00:10 TimeLimit=01:00:00" ;;
    "scontrol --oneliner show partition") echo "PartitionName=cpu State=UP MaxTime=1-00:00:00 Default=YES" ;;
    "sinfo "*%R) echo cpu; echo gpu ;;
    "sinfo "*"%P|%l") echo "cpu*|1-00:00:00"; echo "gpu|2-00:00:00" ;;
    "sinfo "*) echo "cpu*|up|1-00:00:00|0/2/0/2|8|16000|(null)|(null)" ;;
    "squeue "*"%i|%T|%r|%N"*) cat "${0%/*}/queue" ;;
esac
"""
METRICS = """
def token_accuracy(logits, labels, tokenizer, ignore_index):
    kept = labels != ignore_index
    return {"token_accuracy": (logits.argmax(-1)[kept] == labels[kept]).float().mean().item()}


def breaks(logits, labels, tokenizer, ignore_index):
    return {"x": 1 / 0}
"""
TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums():
    samples = [Sample(input=f"{n} + 1 =", target=str(n + 1), metadata={"even": n % 2 == 0}) for n in range(4)]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match())
"""

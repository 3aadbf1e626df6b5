"""Malformed files of a user's own config groups, for commands that must refuse them."""

# Path below the folder of --config-dir (or of hydra.searchpath) -> text.
OWN_GROUPS = {
    "dataset/typo.yaml": "name: mine\npth: my.json\n",
    "dataset/type.yaml": "name: mine\npath: my.json\nmax_seq_len: lots\n",
    "dataset/syntax.yaml": "name: mine\n path: : my.json\n",
    "dataset/list.yaml": "- name\n- path\n",
    "dataset/misplaced.yaml": "name: mine\npath: my.json\nlr: 1e-3\n",
    "dataset/root.yaml": "# @package _global_\nlrr: 1e-3\n",
    "dataset/empty.yaml": "",
    "model/typo.yaml": "defaults: [hf_llama, _self_]\nname: mine\ndowload: x\n",
    "model/base.yaml": "defaults: [hf_lama, _self_]\nname: mine\n",
    "model/extra.yaml": "# @package _global_\ndefaults: [hf_llama, _self_]\ntorchtune:\n  modle: 8\n",
}

"""Run in a process of its own: what plain PEFT makes of exported adapters, with this package out of reach.

``python plain_peft.py FOLDER`` reads ``FOLDER/cases.pt``, a list of (base model, folder of an adapter, tokens), and
writes the logits to ``FOLDER/logits.pt``.
"""

import sys

sys.modules["stella_kernels"] = None  # importing it raises ImportError

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402


@torch.no_grad()
def main(folder: str) -> None:
    logits = []
    for base, adapter, ids in torch.load(f"{folder}/cases.pt", weights_only=False):
        model = PeftModel.from_pretrained(base, adapter).eval()
        assert model.peft_config["default"].peft_type == "LORA"
        logits.append(model(input_ids=ids).logits)
    torch.save(logits, f"{folder}/logits.pt")


main(sys.argv[1])

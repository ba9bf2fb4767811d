"""What published chat templates do to a row, each in a few lines of our own; `TEMPLATES` by the model they are of.

`framed` are those that put something round each content. The others trim, split `<think>`, move or add a system turn,
want lists of parts, or write reasoning and calls in their own way.
"""

# ruff: noqa: E501
from collections.abc import Mapping
from typing import Final

Frame = tuple[str, str, str]
IM: Final = ("<|im_start|>", "\n", "<|im_end|>\n")
HEADER: Final = ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")


def framed(
    frame: Frame, *, start: str = "", default: str = "", trim: bool = False, names: str = "", rest: str = ""
) -> str:
    """Each content between a role and an end; `default` is a system turn where there is none."""
    before, between, end = frame
    content = "m.content|trim" if trim else "m.content"
    role = f"{{{names}}}.get(m.role, m.role)" if names else "m.role"
    missing = "{%- if not messages[0].role == 'system' or not messages[0].content %}"
    first = f"{missing}{{{{- '{before}system{between}{default}{end}' }}}}{{%- endif %}}" if default else ""
    skip = "{%- if m.role != 'system' or m.content %}" if default else "{%- if true %}"
    return (
        f"{start}{first}{{%- for m in messages %}}{skip}{{{{- '{before}' + {role} + '{between}' + {content} + '{end}' }}}}"
        f"{{%- endif %}}{{%- endfor %}}{rest}"
        f"{{%- if add_generation_prompt %}}{{{{- '{before}assistant{between}' }}}}{{%- endif %}}"
    ).replace("\n", "\\n")


SPLIT: Final = (
    "{%- set think = '' %}{%- set text = m.content or '' %}"
    "{%- if m.reasoning_content is string %}{%- set think = m.reasoning_content %}"
    "{%- elif '</think>' in text %}"
    "{%- set think = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
)
"""As Qwen3: reasoning from its own key, or out of the content."""
CALLS: Final = (
    '{%- for c in m.tool_calls or [] %}{{- \'\\n<tool_call>\\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
    "{{- c.function.arguments if c.function.arguments is string else c.function.arguments|tojson }}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}"
)
TOOLS: Final = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for t in tools %}{{- t|tojson ~ '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
)


def qwen3(*, think: str, drops: bool, trim: bool = False, prompt: str = "") -> str:
    """Reasoning in front of the text, of earlier turns too unless it `drops` them."""
    text = "text|trim" if trim else "text.lstrip('\\n')"
    shown = "loop.last" if drops else "true"
    return (
        TOOLS + "{%- for m in messages %}{%- if m.role == 'assistant' %}" + SPLIT + "{{- '<|im_start|>assistant\\n' }}"
        f"{{%- if ({shown}) and ({think}) %}}{{{{- '<think>\\n' + think.strip('\\n') + '\\n</think>\\n\\n' }}}}{{%- endif %}}"
        f"{{{{- {text} }}}}" + CALLS + "{{- '<|im_end|>\\n' }}{%- elif m.role == 'tool' %}"
        "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n{prompt}' }}}}"
        "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    )


def instruct(*, user: str, answer: str, system: str, start: str = "{{- bos_token }}") -> str:
    """As Llama-2 and Mistral: the system turn goes into a user turn, the first or the last."""
    where = "n.users == 1" if system == "first" else "n.users == total"
    return (
        "{%- set n = namespace(users=0, system='') %}"
        "{%- if messages[0].role == 'system' %}{%- set n.system = messages[0].content + '\\n\\n' %}{%- endif %}"
        "{%- set total = messages|selectattr('role', 'equalto', 'user')|list|length %}" + start +
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set n.users = n.users + 1 %}"
        f"{{{{- {user.format(where=where)} }}}}"
        f"{{%- elif m.role == 'assistant' %}}{{{{- {answer} }}}}"
        "{%- elif m.role != 'system' %}{{- raise_exception('Only user and assistant roles are supported') }}"
        "{%- endif %}{%- endfor %}"
    )  # fmt: skip


STRICT: Final = (
    "{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate') }}{%- endif %}{%- endfor %}"
)
R1: Final = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}"
    "{%- elif m.role == 'system' %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"
)
HARMONY: Final = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if m.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{%- endif %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
XML_CALLS: Final = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '')|trim }}"
    "{%- for c in m.tool_calls or [] %}{{- '<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{%- for key, value in c.function.arguments|items %}"
    "{{- '<parameter=' ~ key ~ '>\\n' ~ value ~ '\\n</parameter>\\n' }}"
    "{%- endfor %}{{- '</function></tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_TOOLS: Final = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.tool_calls %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments|tojson + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content|tojson + '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
PARTS: Final = (
    "{%- for m in messages %}{{- m.role|capitalize + ':' }}{%- for part in m.content %}{{- ' ' + part.text }}{%- endfor %}"
    "{{- '<end_of_utterance>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
DROPS: Final = (
    "{%- for m in messages %}{%- if m.content %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
INST: Final = "'[INST] ' + (n.system if {where} else '') + m.content + ' [/INST]'"
LLAMA2: Final = "bos_token + '[INST] ' + ('<<SYS>>\\n' + n.system + '<</SYS>>\\n' if {where} and n.system else '') + m.content|trim + ' [/INST]'"
TURN: Final = "'<start_of_turn>user\\n' + (n.system if {where} else '') + m.content|trim + '<end_of_turn>\\n'"
MODEL: Final = "'<start_of_turn>model\\n' + m.content|trim + '<end_of_turn>\\n'"

TEMPLATES: Final[Mapping[str, str]] = {
    "chatml": framed(IM),
    "qwen2.5": framed(IM, default="You are Qwen."),
    "hermes": TOOLS + framed(IM),
    "openchat": framed(("GPT4 Correct ", ": ", "<|end_of_turn|>"), start="{{- bos_token }}", names="'user': 'User'"),
    "zephyr": framed(("<|", "|>\n", "</s>\n")),
    "phi3.5": framed(("<|", "|>\n", "<|end|>\n"), rest="{%- if not add_generation_prompt %}{{- eos_token }}{%- endif %}"),
    "falcon": framed(("", ": ", "\n\n"), names="'user': 'User', 'assistant': 'Falcon'"),
    "falcon3": framed(("<|", "|>\n", "\n"), rest="{%- if not add_generation_prompt %}{{- eos_token }}{%- endif %}"),
    "vicuna": framed(("", ": ", " "), names="'user': 'USER', 'assistant': 'ASSISTANT'"),
    "alpaca": framed(("### ", ":\n", "\n\n"), names="'user': 'Instruction', 'assistant': 'Response'"),
    "granite": framed(("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n"), default="You are Granite."),
    "glm4": framed(("<|", "|>\n", ""), start="{{- '[gMASK]<sop>' }}"),
    "llama3": framed(HEADER, start="{{- bos_token }}", trim=True),
    "llama3.1": framed(HEADER, start="{{- bos_token }}", trim=True, default="Cutting Knowledge Date: December 2023"),
    "llama3 tools": LLAMA_TOOLS,
    "qwen3": qwen3(think="think or loop.last", drops=True),
    "qwen3 training": qwen3(think="think", drops=False),
    "qwen3 thinking": qwen3(think="true", drops=True, prompt="<think>\\n"),
    "qwen3.5": qwen3(think="think", drops=True, trim=True, prompt="<think>\\n"),
    "qwen3-coder": XML_CALLS,
    "deepseek-r1": R1,
    "gpt-oss": HARMONY,
    "llama2": instruct(user=LLAMA2, answer="' ' + m.content|trim + ' ' + eos_token", system="first", start=""),
    "mistral v1": instruct(user=INST, answer="' ' + m.content + eos_token", system="first"),
    "mistral v3": instruct(user=INST, answer="' ' + m.content|trim + eos_token", system="last"),
    "gemma": "{{- bos_token }}" + STRICT + instruct(user=TURN, answer=MODEL, system="first", start=""),
    "gemma3": instruct(user=TURN, answer=MODEL, system="first"),
    "smolvlm": PARTS,
    "ministral": DROPS,
}  # fmt: skip

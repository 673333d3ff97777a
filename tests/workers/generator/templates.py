"""Chat templates of the habits that families of models have, over the tokens of the character
tokenizer.
"""

PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)

TRIMMING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "| trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ENDLESS = (  # leaves out the end of the last turn
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}"
    "{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>assistant:' }}{% endif %}"
)

THINKING = (  # renders reasoning, and drops it once a later user message has come
    "{% set last = namespace(user=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set last.user = loop.index0 "
    "%}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and message['reasoning_content'] and loop.index0 > "
    "last.user %}"
    "{{ '<think>\n' + message['reasoning_content'].strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<call>' + call['function']['name'] + ' ' + (call['function']['arguments'] | tojson) + "
    "'</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# writes an empty block of reasoning into the last answer, which the generation prompt does not have
SCAFFOLD = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PREFILLED = (  # the generation prompt opens the reasoning, which the finished answer does not show
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + "
    "'<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:<think>\n' }}{% endif %}"
)

FICKLE = (  # renders what came before in another way once an answer follows
    "{% for message in messages %}{{ message['role'] + (messages | length | string) + "
    "message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)

CLOSED = (  # ends every chat with a token, as Phi-3 does
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)

MOVING = (  # shows the system message before the last user message alone, as Mistral does
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ';' }}"
    "{% endif %}{{ 'user:' + message['content'] + '<|im_end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)

ONE_CALL = (  # renders the first tool call, and no text beside it
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['tool_calls'] %}"
    "{% set call = message['tool_calls'][0]['function'] %}"
    "{{ call['name'] + ' ' + call['arguments'] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

ANNOUNCING = (  # the prompt names a kind of answer that the finished chat does not
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant, briefly:' }}{% endif %}"
)

ALTERNATING = (
    "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant here') }}{% endif %}"
    "{{ message['role'] + ':' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SWITCHED = (  # thinks unless told not to, as Qwen3 does
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (message['reasoning_content'] or '').strip('\n') + '\n</think>\n\n' }}"
    "{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

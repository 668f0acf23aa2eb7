"""Text that tries to run as code, or to break the layout of a page that shows it."""

HACK = "globalThis.hacked=1"
HOSTILE = [
    f"<script>{HACK}</script>",
    f"</script><script>{HACK}</script>",
    f"<!--<script>{HACK}</script>-->",
    f"<!--<script><script></script>{HACK}",
    f"</title><script>{HACK}</script>",
    f"</style></textarea></noscript><img src=x onerror={HACK}>",
    f"<svg/onload={HACK}>",
    '"><iframe srcdoc="<script>parent.hacked=1</script>">',
    f"' onmouseover='{HACK}' style='position:fixed;inset:0",
    f"javascript:{HACK}",
    "<base href='https://example.com/'><meta http-equiv=refresh content='0;url=about:blank'>",
    "<style>*{display:none!important}</style><link rel=stylesheet href=//example.com/x>",
    "{{model}} {{policy}} {{facts}} ${hacked=1} \\u003cscript>",
    '"};' + HACK + ';//\\"\\',
    "&lt;b&gt;&amp;amp; &#60;script&#62;",
    "\u2028\u2029\u0000\u0008\u001b[31m\r\n\ttext",
    "\u202eright to left\u2066 for ever \u05d0\u05d1\u05d2",
    "W" * 5000,
    "Z\u0334\u0321\u0330" + "\u0301\u0323" * 400,
    "line\n" * 200 + "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 100,
]

"""The page's CSS: light and dark, from a phone to a wide screen, and on paper."""

CSS = """
:root{--ink:#1c2126;--dim:#59626d;--faint:#c9ced6;--paper:#fff;--card:#f6f7f9;--link:#005a9c;
--warn:#8a4b00;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#77808a}
@media (prefers-color-scheme:dark){:root{--ink:#e8ebef;--dim:#a3adb8;--faint:#3b444e;
--paper:#14181c;--card:#1d2329;--link:#7cc4ff;--warn:#f0b060;--c0:#4aa3df;--c1:#ff8a3d;--c2:#2fc79a;
--c3:#e39cc4;--c4:#f2b632;--c5:#9bd4f7;--c6:#a9b2bc}}
@media print{:root{--ink:#000;--dim:#333;--faint:#bbb;--paper:#fff;--card:#fff;--link:#000;
--warn:#000;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#77808a}
nav{display:none!important}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible!important}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:1440px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.25rem;margin:1.8em 0 .6em;
border-bottom:1px solid var(--faint)}h3{font-size:1rem;margin:.8em 0 .3em}
p{margin:.4em 0;max-width:80ch}a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin-top:.8rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1rem;
margin:1rem 0}
figure{margin:0;padding:.6rem;background:var(--card);border-radius:8px;min-width:0}
figure h3{margin:0 0 .3em}
svg{display:block;width:100%;height:auto;margin:0 auto}
svg text{font-family:system-ui,sans-serif!important}
figcaption{color:var(--dim);font-size:.87rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--faint);
vertical-align:top;overflow-wrap:normal}
td{max-width:60ch}td:first-child{white-space:nowrap}
th{color:var(--dim);font-weight:600}
pre{background:var(--card);padding:.6rem;border-radius:8px;overflow-x:auto;white-space:pre-wrap;
font-size:.85rem}
summary{cursor:pointer;font-weight:600;margin:.8em 0 .3em}
.missing{color:var(--warn)}
""".replace("\n", "")

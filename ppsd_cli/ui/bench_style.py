"""The style of the report page: system fonts, two themes, no request to anywhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --panel: #f3f4f2; --ink: #1b222d; --soft: #565f6c; --line: #d5d9de;
  --track: #e9ebee; --blue: #2b5f94; --ochre: #9c6412; --plum: #7a4585; --slate: #6d7886;
  --useful: #2f7d5b; --void: #c0563f; --bubble: #9ba4b0; --prompt: #4a7fb5; --good: #226847;
  --bad: #a93a24;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --panel: #1c2128; --ink: #e4e7eb; --soft: #a2abb7; --line: #363d47;
    --track: #262c34; --blue: #7cb0e4; --ochre: #dba650; --plum: #c698cf; --slate: #8f9aa8;
    --useful: #5cb98d; --void: #e0806a; --bubble: #6b7582; --prompt: #6fa3d8; --good: #74cfa2;
    --bad: #f0917c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.5rem; }
.kicker { color: var(--soft); font-size: .85rem; letter-spacing: .04em; margin: 0 0 .25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; line-height: 1.5; }
.note { color: var(--soft); font-size: .875rem; }
.facts {
  display: flex; flex-wrap: wrap; gap: 1px;
  margin: 1.5rem 0 0; padding: 0; background: var(--line); border: 1px solid var(--line);
  border-radius: 6px; overflow: hidden;
}
.facts div { flex: 1 1 9.5rem; background: var(--paper); padding: .75rem 1rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.4rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts small { display: block; color: var(--soft); font-size: .8rem; }
.scroll {
  overflow-x: auto; border-bottom: 1px solid var(--line);
  background:
    linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll;
}
.scroll:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4; }
caption { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
th, td { padding: .45rem .6rem; text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
thead th { border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
tr > :first-child { position: sticky; left: 0; padding-left: 0; background: var(--paper); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .number { white-space: normal; min-width: 3.5rem; }
.text { min-width: 7rem; max-width: 30rem; overflow-wrap: anywhere; }
tbody th { max-width: 11rem; overflow-wrap: anywhere; }
.short { white-space: nowrap; }
.spread { color: var(--soft); }
figure { margin: 1rem 0 0; }
figcaption { font-weight: 600; margin-bottom: .25rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.pair { gap: 1rem 2.5rem; }
.chart { display: block; width: 100%; overflow: visible; font-size: 13px; }
.chart text { fill: var(--ink); font-variant-numeric: tabular-nums; }
.chart .small { fill: var(--soft); font-size: 12px; }
.chart .figure { fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; padding: 0; }
.legend { list-style: none; font-size: .875rem; color: var(--soft); }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
.key { vertical-align: -.08rem; border-radius: 2px; }
.blue { fill: var(--blue); background: var(--blue); }
.ochre { fill: var(--ochre); background: var(--ochre); }
.plum { fill: var(--plum); background: var(--plum); }
.slate { fill: var(--slate); background: var(--slate); }
.useful { fill: var(--useful); background: var(--useful); }
.void { fill: var(--void); background: var(--void); }
.bubble { fill: var(--bubble); background: var(--bubble); }
.prompt { fill: var(--prompt); background: var(--prompt); }
.wait { fill: var(--bubble); background: var(--bubble); }
.head { fill: var(--plum); background: var(--plum); }
.layers { fill: var(--blue); background: var(--blue); }
.track { fill: var(--track); }
.rule { stroke: var(--line); }
.reference { stroke: var(--ink); stroke-dasharray: 3 2; }
.key.reference { border-left: 2px dashed var(--ink); border-radius: 0; width: .2rem; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.halo { stroke: var(--paper); stroke-width: 4; }
.whisker.blue { stroke: var(--blue); }
.whisker.ochre { stroke: var(--ochre); }
.whisker.plum { stroke: var(--plum); }
.ideal { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5; }
.key.ideal { width: .6rem; height: .6rem; transform: rotate(45deg); background: var(--paper); }
.key.ideal { border: 1.5px solid var(--ink); margin: 0 .55rem 0 .15rem; border-radius: 0; }
.curve { fill: none; stroke-width: 1.5; stroke-dasharray: 5 3; }
.curve.blue { stroke: var(--blue); }
.curve.ochre { stroke: var(--ochre); }
.curve.plum { stroke: var(--plum); }
.key.curve { height: 0; border-top: 2px dashed var(--soft); vertical-align: .25rem; }
.square { fill: var(--paper); stroke: var(--slate); stroke-width: 2; }
.square.blue { stroke: var(--blue); }
.square.ochre { stroke: var(--ochre); }
.square.plum { stroke: var(--plum); }
.key.square { background: var(--paper); border: 2px solid var(--soft); border-radius: 0; }
.passed { color: var(--good); }
.failed { color: var(--bad); }
.failed li { margin: .25rem 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: 1rem; }
pre { border-radius: 6px; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  main { padding-top: 1.5rem; }
  h1 { font-size: 1.4rem; }
  .lead { font-size: 1.05rem; }
}
@media print { .scroll { overflow: visible; } main { max-width: none; } }
"""

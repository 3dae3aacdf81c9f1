"""How the data report looks: light, calm, the system's own letters, from 360 px of width to paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #566270; --line: #dfe3e8; --ground: #f6f7f9; --kept: #2f6f9f;
  --rejected: #c0562f; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, nav, main { max-width: 1200px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { margin: 0 0 4px; font-size: 28px; letter-spacing: -0.01em; }
h2 { margin: 0 0 8px; font-size: 20px; }
h3 { margin: 0; font-size: 15px; }
p { margin: 0 0 8px; }
bdi, code, td, th, p { overflow-wrap: anywhere; }
code, pre { font: 0.92em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.lead { color: var(--soft); }
.note { color: var(--soft); font-size: 13px; }
.line { display: block; }
.skip { position: absolute; left: -10000px; }
.skip:focus { left: 8px; top: 8px; background: #fff; padding: 8px; z-index: 2; }
a { color: var(--kept); }
a:focus-visible, summary:focus-visible, pre:focus-visible { outline: 3px solid var(--kept); outline-offset: 2px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; padding-top: 14px; padding-bottom: 6px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px; margin: 12px 0 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 14px 0; }
.cards div { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 24px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: normal; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
table.figures td, table.figures thead th:not(:first-child), table.numbers td,
table.numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.barred { table-layout: fixed; }
.barred thead th:nth-child(2), .barred thead th:nth-child(3) { width: 110px; }
.barred thead td { width: 34%; }
.barred td:last-child { padding-left: 20px; }
.group th { padding-top: 16px; }
.funnel { display: grid; grid-template-columns: 130px 1fr 220px; gap: 4px 14px; align-items: center; padding: 6px 0; }
.funnel p { margin: 0; }
.lost { color: var(--rejected); }
.bar { display: block; width: 100%; height: 16px; background: #eceff2; border-radius: 3px; }
td .bar { height: 10px; margin: 6px 0; }
rect.kept { fill: var(--kept); }
rect.rejected { fill: var(--rejected); }
.base { stroke: var(--ink); stroke-width: 0.6; }
.tick { stroke: var(--soft); stroke-width: 0.6; }
svg text { fill: var(--soft); font-size: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.swatch.kept { background: var(--kept); }
.swatch.rejected { background: var(--rejected); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 22px; }
figure { margin: 0; min-width: 0; }
.chart svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; color: var(--kept); font-size: 13px; }
.numbers { font-size: 13px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 16px 12px; }
.gallery img, .blank { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #eceff2;
  border-radius: 6px; }
.gallery figcaption { margin-top: 5px; font-size: 13px; line-height: 1.35; }
.gallery p { margin: 0; }
.words bdi { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
pre { max-height: 420px; overflow: auto; background: var(--ground); padding: 10px; border-radius: 6px; }
@media (max-width: 640px) {
  section { padding: 14px 12px; }
  .funnel { grid-template-columns: 1fr auto; }
  .funnel .bar { grid-column: 1 / 3; grid-row: 2; }
  .barred td:last-child { display: none; }
  .barred thead th:nth-child(2) { width: 60px; }
  .barred thead th:nth-child(3) { width: 88px; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
  th, td { padding-right: 6px; }
}
@media print {
  body { background: #fff; font-size: 11px; }
  nav, .skip, details { display: none; }
  section { border: 0; padding: 0; margin: 0 0 18px; }
  figure, tr, .funnel { break-inside: avoid; }
  .bar, rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .gallery { grid-template-columns: repeat(8, 1fr); }
}
"""
"""The page's only style sheet."""

"""The page's look. Colours live in variables, once for paper and once for a dark screen; nothing is loaded from anywhere."""

# Series colours are those of Okabe and Ito (distinct under colour blindness), darkened for lines on white and lightened for dark.
_LIGHT = """
--paper:#fdfdfb;--raised:#ffffff;--sunk:#f4f4ef;--ink:#1c2126;--soft:#59636e;--rule:#e3e3dc;--strong:#bdbdb4;--link:#0a5a96;
  --focus:#0a5a96;
--heat:236 126 20;--c0:#0067a8;--c1:#c64f00;--c2:#007d5c;--c3:#a8457f;--c4:#8a6d00;--c5:#6b7680;--c6:#98a1aa;--c7:#1c2126;--c8:#5b4bb0;
--mask:#e9e6f4;--mask-ink:#5a4d8a;--new:#cfe8dc;--new-ink:#0c4a35;color-scheme:light;
"""
_DARK = """
--paper:#13171b;--raised:#191e23;--sunk:#1f252b;--ink:#e4e6e3;--soft:#9ba5ae;--rule:#2b3238;--strong:#4a545d;--link:#7dbdf0;
  --focus:#7dbdf0;
--heat:200 98 12;--c0:#5db4f0;--c1:#f58a4b;--c2:#35c295;--c3:#e08fbe;--c4:#d9b93a;--c5:#97a3ad;--c6:#6c7780;--c7:#f0f1ee;--c8:#a99cf0;
--mask:#2c2a41;--mask-ink:#b9aef0;--new:#174536;--new-ink:#b9f0d8;color-scheme:dark;
"""

STYLE = (
    ":root{" + _LIGHT + "}@media (prefers-color-scheme:dark){:root{" + _DARK + "}}"
    ":root[data-theme=light]{"
    + _LIGHT
    + "}:root[data-theme=dark]{"
    + _DARK
    + "}"
    + """
*{box-sizing:border-box}
html{scroll-padding-top:1rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
  "Noto Sans",sans-serif;
display:grid;grid-template-columns:11.5rem minmax(0,1fr)}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"URW Palladio L",P052,Charter,Georgia,"DejaVu Serif",serif;
  font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:2.3rem;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.55rem;margin:0 0 .6rem}
h3{font-size:1.14rem;margin:2rem 0 .6rem}
h4{font-size:.95rem;margin:1.5rem 0 .4rem}
h5{font-size:.78rem;margin:0 0 .35rem;color:var(--soft);font-weight:600}
a{color:var(--link)}
code,pre,.window,.lens{font-family:ui-monospace,"SF Mono",SFMono-Regular,"Cascadia Code",Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-size:.88em;overflow-wrap:anywhere}
small{font-size:.82em}
:focus-visible{outline:2px solid var(--focus);outline-offset:2px;border-radius:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;z-index:9;background:var(--raised);padding:.4rem .8rem}
nav{position:sticky;top:0;align-self:start;height:100vh;padding:2.6rem 0 1.5rem 1.6rem;display:flex;flex-direction:column;font-size:.9rem}
nav .brand{margin:0 0 1.4rem;font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.8rem;color:var(--soft)}
nav ul{list-style:none;margin:0;padding:0}
nav li a{display:block;padding:.24rem 0 .24rem .7rem;border-left:2px solid var(--rule);color:var(--soft);text-decoration:none}
nav li a:hover{color:var(--ink)}
nav li a[aria-current]{color:var(--ink);border-color:var(--ink);font-weight:600}
nav button{margin-top:auto;align-self:flex-start}
main{padding:2.4rem 2.4rem 6rem 2.6rem;max-width:76rem;min-width:0}
main>header{margin-bottom:2.6rem}
main>section{padding-top:2.2rem;margin-top:3rem;border-top:1px solid var(--rule)}
.over{margin:0;color:var(--soft);font-size:.85rem}
.lead{max-width:46rem;color:var(--soft);margin:.2rem 0 1.1rem}
header .lead{color:var(--soft)}
.missing{max-width:46rem;color:var(--soft);border-left:3px solid var(--strong);padding:.15rem 0 .15rem .8rem;margin:.8rem 0;
  font-size:.93em}
.kind{display:block;font-weight:400;color:var(--soft)}
.site{color:var(--soft);font-weight:400;white-space:nowrap}
.said{color:var(--soft);margin:0 0 .8rem;font-size:.92rem}
button,select,input{font:inherit;color:inherit;background:var(--raised);border:1px solid var(--strong);border-radius:5px;
  padding:.28rem .6rem}
button{cursor:pointer}button:hover{border-color:var(--ink)}
.quiet{border-color:transparent;background:none;color:var(--soft);font-size:.82rem;padding:.2rem .5rem .2rem 0}
html:not(.js) .needs-script{display:none}

.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums lining-nums}
caption{text-align:left;color:var(--soft);font-size:.82rem;padding-bottom:.35rem}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:baseline;font-weight:400}
thead th{border-bottom:1.5px solid var(--ink);font-weight:600;vertical-align:bottom;line-height:1.3}
tbody tr+tr>*{border-top:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:1.5px solid var(--strong)}
th.n,td.n{text-align:right;white-space:nowrap;padding-left:.6rem}
tbody th{white-space:nowrap}
.fidelity thead th{border-bottom:0}.fidelity thead tr:last-child th,.fidelity thead th[rowspan]{border-bottom:1.5px solid var(--ink)}
.fidelity .over{border-bottom:2px solid currentColor;font-weight:600;font-size:.87rem}
.fidelity .over{border-bottom-color:var(--c)}.fidelity .over{color:var(--ink)}
.fidelity thead tr:last-child th{font-weight:400;color:var(--soft)}
.fidelity .sub{padding-left:1rem;color:var(--soft)}
td small{display:block;color:var(--soft);font-size:.86em;line-height:1.2}
.halves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 3rem}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1.2rem;margin:.6rem 0 1rem;font-size:.92rem}
.facts dt{color:var(--soft)}.facts dd{margin:0}
pre{background:var(--sunk);padding:.9rem 1.1rem;overflow:auto;max-height:26rem;border-radius:6px;font-size:.82rem;line-height:1.5}
summary{cursor:pointer;color:var(--soft);font-size:.85rem;width:max-content;max-width:100%}summary:hover{color:var(--ink)}

.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
  .c7{--c:var(--c7)}.c8{--c:var(--c8)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1.6rem 2rem;margin:.6rem 0 1.2rem;
  align-items:start}
.plots.large{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:.9rem;margin-bottom:.3rem;line-height:1.35}figcaption strong{font-weight:600}
.note{color:var(--soft);font-size:.8rem;display:block}
.plot{display:block;width:100%;height:auto;overflow:visible;font-family:inherit}
.plot text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.plot .l{font-size:11.5px;fill:var(--soft)}.plot .h{font-size:12px;fill:var(--ink);font-weight:600}
.g{stroke:var(--rule);stroke-width:1}.z{stroke:var(--strong);stroke-width:1.2}.t{stroke:var(--soft);stroke-width:1}
.s{stroke:var(--c);stroke-width:1.6;fill:none;stroke-linejoin:round;stroke-linecap:round}.strong .s{stroke-width:2.4}
.i{stroke:var(--c);stroke-width:1.6}.strong .i{stroke-width:2.2}
.m{fill:var(--c);stroke:var(--paper);stroke-width:.8}.m.open{fill:var(--paper);stroke:var(--c);stroke-width:1.6}
.bars rect{fill:var(--c)}
.ground{fill:var(--sunk)}.cell{fill:rgb(var(--heat))}.cell.outlined{stroke:var(--ink);stroke-width:1}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:0 0 .4rem;padding:0;font-size:.8rem;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:.4rem}.legend svg{flex:none}
.numbers{margin-top:.1rem}.numbers summary{font-size:.78rem}.numbers .scroll{max-height:22rem;overflow:auto}

.window{font-size:.85rem;line-height:1.95;white-space:pre-wrap;overflow-wrap:anywhere}
.window b,.tok{font-weight:400;unicode-bidi:isolate;border-radius:2px;padding:.1em 0}
.window b,.tok[style]{background:rgb(var(--heat)/calc(.1 + .62*var(--a)));box-shadow:inset 0 calc(-1px - 2px*var(--a)) rgb(var(--heat))}
.window i,.tok.masked{font-style:normal;color:var(--mask-ink);background:var(--mask);border-radius:3px;padding:.08em .14em;margin:0 1px;
  unicode-bidi:isolate}
.window b>i{background:none}.tok.masked[style]{background:linear-gradient(rgb(var(--heat)/calc(.1 + .62*var(--a))),
  rgb(var(--heat)/calc(.1 + .62*var(--a)))),var(--mask)}
.window s{font-size:.84em;margin-left:.12em;text-decoration:line-through 1px;
  text-decoration-color:color-mix(in srgb,currentColor 45%,transparent)}
.window i,.tok{display:inline-block;max-width:100%;line-height:1.35;vertical-align:baseline}
.inline{white-space:nowrap}
.given{color:var(--soft)}
.dictionary{margin-top:2.4rem}
.dictionary>h3{margin-top:0;padding-left:.7rem;border-left:4px solid var(--c)}
.latents>article{padding:1rem 0;border-top:1px solid var(--rule);content-visibility:auto;contain-intrinsic-size:auto 460px}
.latents h4{margin:0 0 .3rem;font-size:1.1rem}
.stats{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:0 0 1rem}
.stats dt{font-size:.76rem;color:var(--soft)}.stats dd{margin:0;font-variant-numeric:tabular-nums;font-size:1rem}
.panels{display:grid;grid-template-columns:minmax(0,19rem) minmax(0,1fr);gap:1.6rem;margin-bottom:.6rem}
.lenses{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1rem 2rem;align-content:start}
.lens{list-style:none;margin:0;padding:0;columns:2;column-gap:1.1rem;font-size:.81rem}
.lens li{display:flex;justify-content:space-between;gap:.4rem;break-inside:avoid;padding:.07rem 0}
.lens .n{color:var(--soft);font-size:.9em;font-variant-numeric:tabular-nums}
.lens code{background:var(--sunk);border-radius:3px;padding:0 .3em;font-size:1em;overflow:hidden;text-overflow:ellipsis;
  white-space:nowrap}

.tabs{display:flex;flex-wrap:wrap;gap:.4rem;margin:0 0 1.2rem}
.tabs button{border-left:4px solid var(--c);font-size:.87rem}.tabs button[aria-selected=true]{background:var(--ink);color:var(--paper);
  border-color:var(--ink);border-left-color:var(--c)}
.explorer{display:grid;grid-template-columns:17rem minmax(0,1fr);gap:1.8rem;align-items:start}
.chooser{position:sticky;top:1rem;display:flex;flex-direction:column;gap:.5rem;max-height:calc(100vh - 2rem)}
.chooser input,.chooser select{width:100%;font-size:.88rem}
.chooser .found{font-size:.78rem;color:var(--soft);margin:0}
.list{list-style:none;margin:0;padding:0;overflow:auto;border:1px solid var(--rule);border-radius:6px;background:var(--raised);
  min-height:6rem;max-height:38rem}
.list li{display:grid;grid-template-columns:3.1rem 1fr;gap:0 .5rem;padding:.32rem .6rem;cursor:pointer;
  border-left:3px solid transparent;font-size:.84rem}
.list li+li{border-top:1px solid var(--rule)}.list li:hover{background:var(--sunk)}
.list li[aria-selected=true]{background:var(--sunk);border-left-color:var(--c)}
.list .id{font-weight:600;font-variant-numeric:tabular-nums}
.list .peaks{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.78rem;white-space:nowrap;overflow:hidden;
  text-overflow:ellipsis}
.list .den{grid-column:2;display:flex;align-items:center;gap:.5rem;color:var(--soft);font-size:.74rem;font-variant-numeric:tabular-nums}
.list .bar{flex:1;height:3px;background:var(--rule);border-radius:2px;overflow:hidden}.list .bar span{display:block;height:100%;
  background:var(--c)}
.js .explorer .latents>article{display:none}.js .explorer .latents>article.on{display:block;padding-top:0;border:0}
.win{padding:.45rem 0 .55rem;border-top:1px solid var(--rule)}
.win .where{font-size:.76rem;color:var(--soft);display:flex;gap:.2rem 1rem;flex-wrap:wrap;font-variant-numeric:tabular-nums}
.win .where b{color:var(--ink);font-weight:600}
.tok.at{outline:2px solid var(--focus);outline-offset:1px}.tok.new{background:var(--new);color:var(--new-ink);
  box-shadow:0 0 0 1px var(--new-ink)}
.readout{position:sticky;bottom:0;background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:.35rem .8rem;
  margin:.8rem 0 .6rem;font-size:.83rem;min-height:2.1rem;font-variant-numeric:tabular-nums}
.description{max-width:46rem;margin:0 0 1rem}
.keys{font-size:.8rem;color:var(--soft)}
.generation{margin-bottom:2.5rem}
.finals,.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem 2rem}
.finals h4,.sides h4{margin:.6rem 0 .2rem}.finals p{margin:.2rem 0}
.js .scrubber+.finals{display:none}
.bench{display:flex;align-items:center;gap:.8rem;flex-wrap:wrap;margin:1rem 0 .4rem}
.bench input{flex:1;min-width:10rem;padding:0;accent-color:var(--link)}.bench output{font-variant-numeric:tabular-nums;min-width:7.5rem;
  font-size:.9rem}
.sides>div{background:var(--raised);border:1px solid var(--rule);border-radius:8px;padding:.4rem 1rem .9rem}
.sides .window{min-height:6rem}.sides .tok:not(.masked){display:inline;line-height:inherit}

@media (max-width:64rem){.explorer{grid-template-columns:minmax(0,1fr)}.chooser{position:static;max-height:none}.list{max-height:15rem}}
@media (max-width:52rem){body{display:block}nav{position:static;height:auto;padding:1rem 1.1rem 0}nav .brand{margin:0 0 .5rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1rem}nav li a{border:0;padding:.1rem 0}nav button{margin:.4rem 0 0}
  main{padding:1.2rem 1.1rem 4rem}h1{font-size:1.8rem}
.panels{grid-template-columns:minmax(0,1fr)}main>section{margin-top:1.8rem}}
@media print{nav,.keys,.readout{display:none}body{display:block}.scroll{overflow:visible}}
@media (prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
"""
)

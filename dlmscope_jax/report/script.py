"""The page's script: it only adds. Text of tokens reaches the page through textContent, never as markup.

``EARLY`` runs before anything is drawn, so that what needs a script does not flash.
"""

EARLY = "document.documentElement.classList.add('js')"

SCRIPT = r"""
'use strict';
(() => {
const make = (name, cls, text) => {
  const node = document.createElement(name);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
const read = id => JSON.parse(document.getElementById(id).textContent);
const say = (value, digits = 3) => {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  const text = size < 1e-4 || size >= 1e7 ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toLocaleString('en');
  return text.replace('-', '−');
};
const share = value => value === null || value === undefined ? '–' : say(100 * value, 2) + ' %';
const reduced = matchMedia('(prefers-reduced-motion: reduce)').matches;

// light or dark: follows the system until the button is used
const root = document.documentElement;
document.getElementById('theme').addEventListener('click', () => {
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
});

// the section in view is marked in the navigation
const links = new Map([...document.querySelectorAll('nav li a')].map(a => [a.hash.slice(1), a]));
if (window.IntersectionObserver) {
  const seen = new Set();
  const watch = new IntersectionObserver(entries => {
    for (const e of entries) e.isIntersecting ? seen.add(e.target.id) : seen.delete(e.target.id);
    let first = true;
    for (const [id, a] of links) {
      if (first && seen.has(id)) { a.setAttribute('aria-current', 'true'); first = false; } else a.removeAttribute('aria-current');
    }
  }, { rootMargin: '-12% 0px -70% 0px' });
  for (const id of links.keys()) watch.observe(document.getElementById(id));
}

// ---- tokens -------------------------------------------------------------------------------------------------
function token(piece, { masked = false, original = '', value = 0, largest = 1, fresh = false } = {}) {
  const node = make('span', 'tok' + (masked ? ' masked' : '') + (fresh ? ' new' : ''));
  if (masked) {
    node.append('▢');
    if (original) node.append(make('s', '', original));
  } else node.textContent = piece;
  if (value > 0) node.style.setProperty('--a', Math.min(1, value / largest).toFixed(3));
  return node;
}

// arrow keys walk over the tokens of a window, the readout says what stands there
function walkable(box, describe, readout) {
  box.tabIndex = 0;
  box.setAttribute('role', 'group');
  let at = -1;
  const tokens = () => box.querySelectorAll('.tok');
  const go = to => {
    const all = tokens();
    if (at >= 0 && all[at]) all[at].classList.remove('at');
    at = to < 0 ? -1 : Math.max(0, Math.min(all.length - 1, to));
    if (at >= 0) { all[at].classList.add('at'); readout.textContent = describe(at); }
  };
  box.addEventListener('keydown', e => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (step) { e.preventDefault(); go(Math.max(0, at + step)); }
    if (e.key === 'Home') { e.preventDefault(); go(0); }
    if (e.key === 'End') { e.preventDefault(); go(tokens().length - 1); }
  });
  box.addEventListener('blur', () => go(-1));
  box.addEventListener('pointerover', e => {
    const i = [...tokens()].indexOf(e.target.closest('.tok'));
    if (i >= 0) readout.textContent = describe(i);
  });
  return go;
}

// ---- latents ------------------------------------------------------------------------------------------------
function explorer(section) {
  const data = read(section.dataset.features);
  const piece = id => data.pieces[id] ?? '#' + id;
  const latents = new Map(data.latents.map(l => [l.id, l]));
  const articles = section.querySelector('.latents');
  const prefix = section.id + '-';
  const frame = make('div', 'explorer');
  const chooser = make('div', 'chooser');
  const search = make('input');
  search.type = 'search';
  search.placeholder = 'Search: number or token';
  search.setAttribute('aria-label', 'Search latents by number, token or document');
  const sort = make('select');
  sort.setAttribute('aria-label', 'Order of latents');
  const orders = {
    density: ['Density, highest first', l => -(l.density ?? 0)],
    '-density': ['Density, lowest first', l => l.density ?? 0],
    max: ['Largest activation first', l => -(l.max ?? 0)],
    id: ['Number', l => l.id],
  };
  for (const [value, [label]] of Object.entries(orders)) sort.append(new Option(label, value));
  const found = make('p', 'found');
  found.setAttribute('aria-live', 'polite');
  const list = make('ul', 'list');
  list.tabIndex = 0;
  list.setAttribute('role', 'listbox');
  list.setAttribute('aria-label', 'Latents of ' + data.name);
  chooser.append(search, sort, found, list);
  section.insertBefore(frame, articles);
  frame.append(chooser, articles);

  for (const l of latents.values()) {
    const peaks = [];
    for (const w of l.windows) {
      const text = piece(w.o[w.k] ?? w.t[w.k]);
      if (!peaks.includes(text)) peaks.push(text);
    }
    l.peaks = peaks;
    const words = new Set([l.said ?? '', ...l.words.map(piece), ...l.windows.map(w => data.documents[w.d])]);
    for (const w of l.windows) w.a.forEach((a, i) => { if (a > 0) { words.add(piece(w.t[i])); if (i in w.o) words.add(piece(w.o[i])); } });
    l.text = [...words].join(' ').toLowerCase();
  }
  const least = Math.min(...data.latents.map(l => l.density).filter(d => d > 0), 1);
  const reach = Math.log(1 / least) || 1;
  let shown = [], chosen = null;

  function fill() {
    const query = search.value.trim().toLowerCase().replaceAll(' ', '·');
    const numeric = /^\d+$/.test(query);
    shown = data.latents.filter(l => !query || (numeric ? String(l.id).startsWith(query) : l.text.includes(query)));
    const key = orders[sort.value][1];
    shown.sort((a, b) => key(a) - key(b) || a.id - b.id);
    const all = data.latents.length;
    found.textContent = shown.length < all ? `${shown.length} of ${all} latents` : `${all} latents; bars are densities, logarithmic`;
    list.replaceChildren(...shown.map(l => {
      const li = make('li');
      li.id = 'o-' + prefix + l.id;
      li.setAttribute('role', 'option');
      li.setAttribute('aria-selected', l.id === chosen);
      const den = make('span', 'den'), bar = make('span', 'bar'), full = make('span');
      full.style.width = Math.max(2, 100 * (1 - Math.log(1 / Math.max(l.density ?? least, least)) / reach)) + '%';
      bar.append(full);
      den.append(bar, share(l.density));
      li.append(make('span', 'id', l.id), make('span', 'peaks', l.peaks.slice(0, 5).join(' ') || 'fires nowhere here'), den);
      li.addEventListener('click', () => choose(l.id, true));
      return li;
    }));
    if (chosen !== null) list.setAttribute('aria-activedescendant', 'o-' + prefix + chosen);
  }

  function choose(id, byUser) {
    if (!latents.has(id)) return;
    chosen = id;
    for (const article of articles.children) article.classList.toggle('on', article.id === prefix + id);
    for (const li of list.children) li.setAttribute('aria-selected', li.id === 'o-' + prefix + id);
    list.setAttribute('aria-activedescendant', 'o-' + prefix + id);
    const li = document.getElementById('o-' + prefix + id);
    if (li && byUser) {
      const top = li.offsetTop - list.offsetTop;
      if (top < list.scrollTop || top + li.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
    }
    draw(latents.get(id));
    if (byUser) history.replaceState(null, '', '#' + prefix + id);
  }

  function draw(l) {
    const box = document.getElementById(prefix + l.id).querySelector('.windows');
    if (box.dataset.drawn) return;
    box.dataset.drawn = 'true';
    if (!l.windows.length) return;
    box.replaceChildren();
    const readout = make('p', 'readout', 'Point at a token, or choose a window and use the arrow keys.');
    readout.setAttribute('aria-live', 'polite');
    for (const [group, title] of Object.entries(data.groups)) {
      const windows = l.windows.filter(w => w.g === group);
      if (windows.length) box.append(make('h5', '', `Windows: ${title}`));
      for (const w of windows) {
        const masked = new Set(w.m), largest = l.max || Math.max(...w.a, 1e-9);
        const win = make('div', 'win'), where = make('div', 'where'), text = make('div', 'window');
        const facts = [data.documents[w.d], `position ${say(w.p, 6)}`];
        where.append(make('b', '', say(Math.max(...w.a))), ...facts.map(fact => make('span', '', fact)));
        if (w.r !== null && w.r !== undefined) where.append(make('span', '', w.r ? `rate ${say(w.r, 2)}` : 'clean text'));
        if (w.q !== null && w.q !== undefined) where.append(make('span', '', `tenth ${w.q + 1} of 10`));
        const original = i => piece(w.o[i] ?? w.t[i]);
        w.t.forEach((t, i) => {
          const node = token(piece(t), { masked: masked.has(i), original: original(i), value: w.a[i], largest });
          node.title = say(w.a[i]);
          text.append(node);
        });
        text.setAttribute('aria-label', `Window in ${data.documents[w.d]}, ${w.t.length} tokens`);
        const stood = i => `${masked.has(i) ? 'masked, was ' : ''}“${original(i)}”`;
        walkable(text, i => `${stood(i)}   activation ${say(w.a[i])}   position ${w.p - w.k + i}`, readout);
        win.append(where, text);
        box.append(win);
      }
    }
    box.append(readout);
  }

  const move = by => {
    const i = shown.findIndex(l => l.id === chosen);
    const next = shown[Math.max(0, Math.min(shown.length - 1, i + by))];
    if (next) choose(next.id, true);
  };
  search.addEventListener('input', fill);
  sort.addEventListener('change', fill);
  list.addEventListener('keydown', e => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[e.key];
    if (by) { e.preventDefault(); move(by); }
  });
  fill();
  if (shown.length) choose(shown[0].id, false);
  return { search, move, choose };
}

// one of several blocks is open; the bar names them
function tabs(box, blocks, label, opened) {
  const bar = make('div', 'tabs');
  bar.setAttribute('role', 'tablist');
  bar.setAttribute('aria-label', label);
  const open = i => {
    blocks.forEach((block, j) => { block.hidden = i !== j; });
    [...bar.children].forEach((b, j) => { b.setAttribute('aria-selected', i === j); b.tabIndex = i === j ? 0 : -1; });
    opened(i);
  };
  blocks.forEach((block, i) => {
    const b = make('button', [...block.classList].filter(c => /^c\d$/.test(c)).join(' '), block.getAttribute('aria-label'));
    b.type = 'button';
    b.setAttribute('role', 'tab');
    b.setAttribute('aria-controls', block.id);
    block.setAttribute('role', 'tabpanel');
    b.addEventListener('click', () => open(i));
    b.addEventListener('keydown', e => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (by) { e.preventDefault(); const j = (i + by + blocks.length) % blocks.length; open(j); bar.children[j].focus(); }
    });
    bar.append(b);
  });
  if (blocks.length > 1) box.prepend(bar);
  open(0);
  return open;
}

for (const box of document.querySelectorAll('.dictionaries')) {
  const sections = [...box.querySelectorAll('.dictionary')], explorers = [];
  let at = 0;
  const open = tabs(box, sections, 'Dictionaries', i => { at = i; explorers[i] ??= explorer(sections[i]); });
  const fromHash = () => {
    const m = /^#d(\d+)-(\d+)$/.exec(location.hash);
    if (!m || !sections[+m[1]]) return;
    open(+m[1]);
    explorers[+m[1]].choose(+m[2], false);
    sections[+m[1]].scrollIntoView({ behavior: 'auto' });
  };
  addEventListener('hashchange', fromHash);
  fromHash();
  addEventListener('keydown', e => {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
    const { top, bottom } = box.getBoundingClientRect();
    if (bottom < 0 || top > innerHeight) return;
    if (e.key === '/') { e.preventDefault(); explorers[at].search.focus(); }
    if (e.key === 'j') explorers[at].move(1);
    if (e.key === 'k') explorers[at].move(-1);
  });
}

// ---- generation ---------------------------------------------------------------------------------------------
for (const box of document.querySelectorAll('.scrubber')) {
  const data = read(box.dataset.generation);
  const piece = id => data.pieces[id] ?? '#' + id;
  const bench = make('div', 'bench'), slider = make('input'), output = make('output'), play = make('button', '', 'Play');
  play.type = 'button';
  slider.type = 'range';
  slider.min = 0;
  slider.max = data.ran;
  slider.value = data.ran;
  slider.setAttribute('aria-label', 'Step');
  bench.append(play, slider, output);
  const sides = make('div', 'sides'), readout = make('p', 'readout', 'Point at a token for its step and activation.');
  readout.setAttribute('aria-live', 'polite');
  const largest = Math.max(...data.sides.flatMap(s => s.activation.flat()), 1e-9);
  const views = data.sides.map(side => {
    const panel = make('div'), text = make('div', 'window');
    panel.append(make('h4', '', side.name), text);
    text.setAttribute('aria-label', side.name);
    sides.append(panel);
    walkable(text, i => {
      const s = +slider.value, commit = side.commit[i];
      const never = data.mask === null ? 'after the end' : 'never committed';
      const when = commit < 0 ? 'prompt' : commit >= data.steps ? never : `committed by step ${commit}`;
      const act = side.activation[s];
      return `“${piece(side.history[s][i])}”   position ${i}   ${when}` + (act ? `   activation ${say(act[i])}` : '');
    }, readout);
    return { side, text };
  });
  const show = () => {
    const s = +slider.value;
    output.textContent = s === data.ran ? `result, ${s} steps` : `step ${s} reads`;
    for (const { side, text } of views) {
      text.replaceChildren(...side.history[s].map((id, i) => {
        const act = side.activation[s];  // none for the result, which no step has read
        const unwritten = data.mask === null && side.commit[i] >= s;  // an autoregressive model has not come that far
        const node = token(unwritten ? '' : piece(id), {
          masked: id === data.mask, value: act ? act[i] : 0, largest, fresh: s > 0 && side.commit[i] === s - 1,
        });
        if (i < data.prompt) node.classList.add('given');
        return node;
      }));
    }
  };
  slider.addEventListener('input', show);
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = 'Play'; };
  play.addEventListener('click', () => {
    if (timer) return stop();
    if (+slider.value >= data.ran) slider.value = 0;
    play.textContent = 'Pause';
    show();
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value >= data.ran) stop();
    }, reduced ? 900 : 350);
  });
  box.append(bench, sides, readout);
  show();
}
for (const box of document.querySelectorAll('.generations')) {
  tabs(box, [...box.querySelectorAll('.generation')], 'Generations', () => {});
}
})();
"""

// TeX formulas -> MathML, which browsers set themselves. The part of TeX that chat models write; a command
// that is not known stays readable under its own name.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_LENGTH = 8000;
const MAX_DEPTH = 40;

const words = (text) => new Set(text.split(" "));

// prettier-ignore
const LETTERS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η",
  theta: "θ", vartheta: "ϑ", iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π",
  varpi: "ϖ", rho: "ρ", varrho: "ϱ", sigma: "σ", varsigma: "ς", tau: "τ", upsilon: "υ", phi: "ϕ",
  varphi: "φ", chi: "χ", psi: "ψ", omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Xi: "Ξ",
  Pi: "Π", Sigma: "Σ", Upsilon: "Υ", Phi: "Φ", Psi: "Ψ", Omega: "Ω", ell: "ℓ", hbar: "ℏ", imath: "ı",
  jmath: "ȷ", Re: "ℜ", Im: "ℑ", wp: "℘", aleph: "ℵ", infty: "∞", partial: "∂", nabla: "∇",
  emptyset: "∅", varnothing: "∅", angle: "∠", top: "⊤", bot: "⊥", degree: "°", prime: "′", dots: "…",
  ldots: "…", cdots: "⋯", vdots: "⋮", ddots: "⋱", square: "□", checkmark: "✓", dagger: "†", S: "§",
  "%": "%", $: "$", "#": "#", "&": "&", _: "_",
};
// prettier-ignore
const OPERATORS = {
  times: "×", div: "÷", pm: "±", mp: "∓", cdot: "⋅", ast: "∗", star: "⋆", circ: "∘", bullet: "•",
  oplus: "⊕", otimes: "⊗", odot: "⊙", le: "≤", leq: "≤", leqslant: "⩽", ge: "≥", geq: "≥",
  geqslant: "⩾", ne: "≠", neq: "≠", equiv: "≡", approx: "≈", sim: "∼", simeq: "≃", cong: "≅",
  propto: "∝", ll: "≪", gg: "≫", prec: "≺", succ: "≻", in: "∈", notin: "∉", ni: "∋", subset: "⊂",
  subseteq: "⊆", supset: "⊃", supseteq: "⊇", cup: "∪", cap: "∩", setminus: "∖", land: "∧", wedge: "∧",
  lor: "∨", vee: "∨", lnot: "¬", neg: "¬", forall: "∀", exists: "∃", nexists: "∄", to: "→",
  rightarrow: "→", leftarrow: "←", gets: "←", leftrightarrow: "↔", Rightarrow: "⇒", Leftarrow: "⇐",
  Leftrightarrow: "⇔", iff: "⟺", implies: "⟹", impliedby: "⟸", mapsto: "↦", uparrow: "↑",
  downarrow: "↓", longrightarrow: "⟶", hookrightarrow: "↪", rightharpoonup: "⇀", perp: "⊥",
  parallel: "∥", mid: "∣", nmid: "∤", vdash: "⊢", models: "⊨", therefore: "∴", because: "∵", colon: ":",
  lbrace: "{", rbrace: "}", "{": "{", "}": "}", langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋",
  lceil: "⌈", rceil: "⌉", vert: "|", lvert: "|", rvert: "|", Vert: "‖", lVert: "‖", rVert: "‖",
  "|": "‖", backslash: "\\", slash: "/",
};
// prettier-ignore
const BIG = {
  sum: "∑", prod: "∏", coprod: "∐", int: "∫", iint: "∬", iiint: "∭", oint: "∮", bigcup: "⋃",
  bigcap: "⋂", bigoplus: "⨁", bigotimes: "⨂", bigvee: "⋁", bigwedge: "⋀",
};
const INTEGRALS = new Set(["int", "iint", "iiint", "oint"]);
const FUNCTIONS = words(
  "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf " +
    "limsup ln log max min mod Pr sec sin sinh sup tan tanh argmax argmin",
);
const UNDER = words("lim liminf limsup max min sup inf det gcd argmax argmin Pr");
// prettier-ignore
const ACCENTS = {
  hat: "^", widehat: "^", bar: "¯", overline: "‾", tilde: "~", widetilde: "~", vec: "→",
  overrightarrow: "→", dot: "˙", ddot: "¨", check: "ˇ", breve: "˘", overbrace: "⏞",
};
const UNDER_ACCENTS = { underline: "_", underbrace: "⏟" };
const SPACES = {
  ",": "0.167em",
  ":": "0.222em",
  ">": "0.222em",
  ";": "0.278em",
  " ": "0.25em",
  quad: "1em",
  qquad: "2em",
};
const IGNORED = words(
  "! displaystyle textstyle scriptstyle limits nolimits nonumber notag big Big bigg Bigg bigl " +
    "bigr Bigl Bigr biggl biggr middle",
);
const FENCES = {
  matrix: ["", ""],
  smallmatrix: ["", ""],
  array: ["", ""],
  pmatrix: ["(", ")"],
  bmatrix: ["[", "]"],
  Bmatrix: ["{", "}"],
  vmatrix: ["|", "|"],
  Vmatrix: ["‖", "‖"],
  cases: ["{", ""],
};

// where Unicode's alphabets begin, and the letters that stood elsewhere before
// prettier-ignore
const ALPHABETS = {
  mathbb: { upper: 0x1d538, lower: 0x1d552, digit: 0x1d7d8, C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
  mathcal: {
    upper: 0x1d49c, lower: 0x1d4b6, B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ",
  },
  mathfrak: { upper: 0x1d504, lower: 0x1d51e, C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
  mathbf: { upper: 0x1d400, lower: 0x1d41a, digit: 0x1d7ce },
  mathsf: { upper: 0x1d5a0, lower: 0x1d5ba, digit: 0x1d7e2 },
  mathtt: { upper: 0x1d670, lower: 0x1d68a, digit: 0x1d7f6 },
};
ALPHABETS.mathscr = ALPHABETS.mathcal;
ALPHABETS.boldsymbol = ALPHABETS.bm = ALPHABETS.mathbf;
const TEXTS = words("text textbf textit textrm texttt mbox mathrm mathit operatorname");

const TOKEN = /\\(?:[A-Za-z]+\*?|[^])|[ \t\r\n]+|\d+(?:[.,]\d+)*|[^]/gu;

function m(tag, attributes = {}, ...children) {
  const element = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A `math` element for a formula, or null for what no formula is. `display`: set on lines of its own. */
export function mathml(tex, display = false) {
  if (tex.length > MAX_LENGTH) return null;
  try {
    const row = new Parser(tex, display).whole();
    const source = m("annotation", { encoding: "application/x-tex" }, tex);
    return m("math", display ? { display: "block" } : {}, m("semantics", {}, row, source));
  } catch (error) {
    if (error instanceof NoFormula) return null;
    throw error;
  }
}

class NoFormula extends Error {}

class Parser {
  constructor(tex, display) {
    this.tokens = tex.match(TOKEN) ?? [];
    this.at = 0;
    this.depth = 0;
    this.display = display;
  }

  whole() {
    const nodes = this.lines(() => this.at >= this.tokens.length, "left");
    if (this.at < this.tokens.length) throw new NoFormula();
    return nodes;
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? "")) this.at++;
    return this.tokens[this.at];
  }

  take() {
    const token = this.peek();
    if (token === undefined) throw new NoFormula();
    this.at++;
    return token;
  }

  /** Rows and columns if there are `\\` or `&`, one row otherwise. */
  lines(ended, align) {
    const rows = [[[]]];
    while (this.peek() !== undefined && !ended()) {
      const row = rows[rows.length - 1];
      if (this.peek() === "\\\\" || this.peek() === "\\cr") {
        this.take();
        if (this.peek() === "[") this.bracketed();
        rows.push([[]]);
      } else if (this.peek() === "&") {
        this.take();
        row.push([]);
      } else row[row.length - 1].push(...this.scripted());
    }
    if (rows.length === 1 && rows[0].length === 1) return m("mrow", {}, ...rows[0][0]);
    if (rows.length > 1 && rows[rows.length - 1].every((cell) => cell.length === 0)) rows.pop();
    const cells = (row) =>
      row.map((cell, i) =>
        m("mtd", { class: align === "pairs" ? (i % 2 ? "left" : "right") : align }, ...cell),
      );
    return m(
      "mtable",
      align === "pairs" ? { displaystyle: "true" } : {},
      ...rows.map((row) => m("mtr", {}, ...cells(row))),
    );
  }

  /** One thing with what stands above and below it; nothing for what is not shown. */
  scripted() {
    const base = this.atom();
    if (base === null) return [];
    let lower = null;
    let upper = null;
    let primes = "";
    for (;;) {
      const token = this.peek();
      if (token === "'") primes += "′";
      else if (token !== "^" && token !== "_") break;
      this.take();
      if (token === "^") upper = this.argument();
      else if (token === "_") lower = this.argument();
    }
    if (primes) upper = m("mrow", {}, m("mo", {}, primes), ...(upper ? [upper] : []));
    if (!lower && !upper) return [base];
    const isUnder = base.getAttribute("data-under") === "yes";
    const [both, below, above] = isUnder ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
    if (lower && upper) return [m(both, {}, base, lower, upper)];
    return [lower ? m(below, {}, base, lower) : m(above, {}, base, upper)];
  }

  /** The argument of a command: a group, or the next thing. */
  argument() {
    const token = this.peek();
    if (token === undefined) throw new NoFormula();
    // TeX takes one digit of a number
    if (/^\d/.test(token) && token.length > 1) {
      this.tokens[this.at] = token.slice(1);
      return m("mn", {}, token[0]);
    }
    return this.atom() ?? m("mrow");
  }

  group() {
    const row = this.lines(() => this.peek() === "}", "center");
    if (this.take() !== "}") throw new NoFormula();
    return row;
  }

  /** What stands between square brackets, as a row. */
  bracketed() {
    this.take();
    const nodes = [];
    while (this.peek() !== "]") nodes.push(...this.scripted());
    this.take();
    return m("mrow", {}, ...nodes);
  }

  /** The characters of a group as they are. */
  raw() {
    if (this.take() !== "{") return this.tokens[this.at - 1];
    let text = "";
    for (let open = 1; ;) {
      const token = this.tokens[this.at++];
      if (token === undefined) throw new NoFormula();
      if (token === "{") open++;
      if (token === "}" && --open === 0) return text;
      text += token.length === 2 && token[0] === "\\" ? token[1] : token;
    }
  }

  atom() {
    if (++this.depth > MAX_DEPTH) throw new NoFormula();
    try {
      const token = this.take();
      if (token === "{") return this.group();
      if (token === "}") throw new NoFormula();
      if (token[0] === "\\") return this.command(token.slice(1));
      if (/^\d/.test(token)) return m("mn", {}, token);
      if (/^\p{L}/u.test(token)) return m("mi", {}, token);
      if (token === "-") return m("mo", {}, "−");
      if (token === "~") return m("mspace", { width: "0.25em" });
      if (token === "*") return m("mo", {}, "∗");
      return "()[]|".includes(token) ? m("mo", { stretchy: "false" }, token) : m("mo", {}, token);
    } finally {
      this.depth--;
    }
  }

  command(name) {
    if (Object.hasOwn(LETTERS, name)) return m("mi", {}, LETTERS[name]);
    if (Object.hasOwn(OPERATORS, name)) return m("mo", { stretchy: "false" }, OPERATORS[name]);
    if (Object.hasOwn(BIG, name)) {
      const under = this.display && !INTEGRALS.has(name);
      return m("mo", { largeop: "true", "data-under": under ? "yes" : "no" }, BIG[name]);
    }
    if (FUNCTIONS.has(name)) {
      const space = /^(\(|\[|\\left)$/.test(this.peek() ?? "") ? "0" : "0.167em";
      const under = this.display && UNDER.has(name) ? "yes" : "no";
      return m(
        "mo",
        { form: "prefix", lspace: "0", rspace: space, movablelimits: "false", "data-under": under },
        name,
      );
    }
    if (Object.hasOwn(SPACES, name)) return m("mspace", { width: SPACES[name] });
    if (IGNORED.has(name)) return null;
    if (Object.hasOwn(ACCENTS, name)) {
      const accent = m("mo", { stretchy: name.length > 5 ? "true" : "false" }, ACCENTS[name]);
      return this.withUnder(m("mover", { accent: "true" }, this.argument(), accent), name === "overbrace");
    }
    if (Object.hasOwn(UNDER_ACCENTS, name)) {
      const accent = m("mo", { stretchy: "true" }, UNDER_ACCENTS[name]);
      return this.withUnder(
        m("munder", { accentunder: "true" }, this.argument(), accent),
        name === "underbrace",
      );
    }
    if (Object.hasOwn(ALPHABETS, name)) return this.inAlphabet(ALPHABETS[name]);
    if (TEXTS.has(name.replace("*", ""))) return this.words(name.replace("*", ""));
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
      case "cfrac":
        return m("mfrac", {}, this.argument(), this.argument());
      case "binom":
        return m(
          "mrow",
          {},
          m("mo", {}, "("),
          m("mfrac", { linethickness: "0" }, this.argument(), this.argument()),
          m("mo", {}, ")"),
        );
      case "sqrt": {
        const degree = this.peek() === "[" ? this.bracketed() : null;
        return degree ? m("mroot", {}, this.argument(), degree) : m("msqrt", {}, this.argument());
      }
      case "overset":
      case "stackrel": {
        const above = this.argument();
        return m("mover", {}, this.argument(), above);
      }
      case "underset": {
        const below = this.argument();
        return m("munder", {}, this.argument(), below);
      }
      case "boxed":
        return m("mrow", { class: "boxed" }, this.argument());
      case "phantom":
        return m("mphantom", {}, this.argument());
      case "not":
        return m("mo", {}, `${this.argument().textContent}\u0338`);
      case "pmod":
        return m(
          "mrow",
          {},
          m("mspace", { width: "0.5em" }),
          m("mo", {}, "("),
          m("mi", {}, "mod"),
          m("mspace", { width: "0.25em" }),
          this.argument(),
          m("mo", {}, ")"),
        );
      case "bmod":
        return m("mo", { lspace: "0.25em", rspace: "0.25em" }, "mod");
      case "tag":
        return m("mtext", {}, `  (${this.raw()})`);
      case "left":
        return this.fenced();
      case "begin":
        return this.environment(this.raw());
      case "right":
      case "end":
      case "\\":
        throw new NoFormula();
      default:
        return m("mtext", { class: "unknown" }, `\\${name}`);
    }
  }

  withUnder(element, isBrace) {
    if (isBrace) element.setAttribute("data-under", "yes");
    return element;
  }

  fence() {
    const token = this.take();
    if (token === ".") return "";
    return token[0] === "\\" ? (OPERATORS[token.slice(1)] ?? "") : token;
  }

  fenced() {
    const opening = this.fence();
    const inside = this.lines(() => this.peek() === "\\right", "center");
    if (this.take() !== "\\right") throw new NoFormula();
    const closing = this.fence();
    return m(
      "mrow",
      {},
      m("mo", { stretchy: "true" }, opening),
      inside,
      m("mo", { stretchy: "true" }, closing),
    );
  }

  environment(name) {
    const bare = name.replace("*", "");
    if (bare === "array") this.raw(); // how its columns are set
    const align = bare === "cases" ? "left" : Object.hasOwn(FENCES, bare) ? "center" : "pairs";
    const table = this.lines(() => this.peek() === "\\end", align);
    if (this.take() !== "\\end" || this.raw() !== name) throw new NoFormula();
    const [opening, closing] = FENCES[bare] ?? ["", ""];
    return opening || closing
      ? m("mrow", {}, m("mo", { stretchy: "true" }, opening), table, m("mo", { stretchy: "true" }, closing))
      : table;
  }

  inAlphabet(alphabet) {
    const row = this.argument();
    for (const leaf of row.localName === "mrow" ? row.children : [row]) {
      if (leaf.children.length === 0)
        leaf.textContent = Array.from(leaf.textContent, (c) => inAlphabet(c, alphabet)).join("");
    }
    return row;
  }

  words(name) {
    const text = this.raw();
    if (name === "operatorname" || name === "mathrm" || name === "mathit") {
      return m("mi", name === "mathit" ? {} : { mathvariant: "normal" }, text);
    }
    // a text keeps its spaces
    return m("mtext", { class: name }, text.replace(/^\s|\s$/g, "\u00a0"));
  }
}

function inAlphabet(character, alphabet) {
  if (alphabet[character]) return alphabet[character];
  const code = character.codePointAt(0);
  if (code >= 65 && code <= 90) return String.fromCodePoint(alphabet.upper + code - 65);
  if (code >= 97 && code <= 122) return String.fromCodePoint(alphabet.lower + code - 97);
  if (code >= 48 && code <= 57 && alphabet.digit) return String.fromCodePoint(alphabet.digit + code - 48);
  return character;
}

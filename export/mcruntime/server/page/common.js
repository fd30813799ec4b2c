// What both pages share: making elements, asking the server, the API key. Nothing here writes HTML from text.

const KEY = "mcdeploy-api-key"; // in sessionStorage: gone with the tab

export const byId = (id) => document.getElementById(id);

/** An element; children are elements or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function show(element, isShown = true) {
  element.hidden = !isShown;
}

/** Text in place of whatever was there, or nothing at all. */
export function say(element, text) {
  element.textContent = text;
  show(element, Boolean(text));
}

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Ask the server; the address is relative, so that the page works behind a prefix. */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  try {
    return await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch {
    throw new ServerError("The server does not answer.", 0);
  }
}

/** As ``send``, and the answer as a tree; an error of the server is thrown. */
export async function ask(path, options = {}) {
  const response = await send(path, options);
  let tree = null;
  try {
    tree = await response.json();
  } catch {
    // told by the status
  }
  if (response.ok && tree !== null) return tree;
  const retry = response.headers.get("Retry-After");
  const later = retry ? ` (again in ${retry} s)` : "";
  throw new ServerError((tree?.error || `The server answered ${response.status}.`) + later, response.status);
}

/** Run ``start`` now, and again with every key that is given, until the server takes it. */
export function withKey(start) {
  const form = byId("key");
  const attempt = async () => {
    try {
      say(byId("trouble"), "");
      await start();
      show(form, false);
    } catch (error) {
      const isLocked = error.status === 401;
      show(form, isLocked);
      const isWrong = isLocked && sessionStorage.getItem(KEY);
      say(byId("trouble"), isWrong ? "This key is not one of the server's." : isLocked ? "This server asks for an API key." : error.message);
      if (isLocked) sessionStorage.removeItem(KEY);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key-text").value.trim());
    byId("key-text").value = "";
    attempt();
  });
  return attempt();
}

export const count = (number) => new Intl.NumberFormat("en").format(number);
export const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)} %`;
export const tiny = (number) => (number === 0 ? "0" : number.toExponential(1));

/** Milliseconds with three figures. */
export function ms(number) {
  return `${number < 1 ? number.toFixed(2) : number < 100 ? number.toPrecision(3) : Math.round(number)} ms`;
}

/** A number in a size one can read: 13.7 M. */
export function short(number) {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= size) return `${(number / size).toPrecision(3)} ${letter}`;
  }
  return String(number);
}

export function table(heads, rows, caption) {
  return make(
    "table",
    {},
    caption ? make("caption", {}, caption) : null,
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
    make(
      "tbody",
      {},
      ...rows.map(([first, ...rest]) =>
        make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((text) => make("td", {}, text))),
      ),
    ),
  );
}

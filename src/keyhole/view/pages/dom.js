// Small helpers: elements, numbers as text, what the server says.

export const byId = (id) => document.getElementById(id);

// An element with properties and children; text is set as text, never as HTML.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A label as it is, and a number with as many digits as say something.
export function written(label) {
  return /^-?\d+\.\d{5,}(e[+-]?\d+)?$/i.test(label) ? String(Number(Number(label).toPrecision(5))) : label || "none";
}

export function percent(share) {
  if (share > 0.999 && share < 1) return "> 99.9 %";
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

export async function ask(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(await response.text());
  return response;
}

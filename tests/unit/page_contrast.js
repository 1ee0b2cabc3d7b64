// [text, contrast ratio] of each text that is seen, by the formula of WCAG 2.2; disabled controls are exempt there.
() => {
  const channels = (color) => {
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backgroundOf = (element) => {
    for (let up = element; up; up = up.parentElement) {
      const { rgb, a } = channels(getComputedStyle(up).backgroundColor);
      if (a === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const ratios = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const text = node.textContent.trim();
    if (!text || !element.checkVisibility() || element.closest("[aria-disabled=true], .unseen, noscript")) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const [dark, light] = [luminance(channels(color).rgb), luminance(backgroundOf(element))].sort((a, b) => a - b);
    ratios.push([text.slice(0, 40), (light + 0.05) / (dark + 0.05)]);
  }
  return ratios;
};

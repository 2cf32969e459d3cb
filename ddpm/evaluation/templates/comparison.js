const slider = document.getElementById("seen");
if (slider) slider.addEventListener("input", () => {
  const at = Number(slider.dataset.positions.split(" ")[slider.value]);
  document.querySelector("output").textContent = at.toLocaleString("en");
  for (const figure of document.querySelectorAll("figure.grid")) {
    const images = [...figure.querySelectorAll("img")];
    const shown = images.filter(image => Number(image.dataset.at) <= at).pop();
    for (const image of images) image.hidden = image !== shown;
    figure.querySelector(".at").textContent =
      shown ? Number(shown.dataset.at).toLocaleString("en") + " images seen" : "no grid yet";
  }
});
